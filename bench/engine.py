"""Tokens per second of the embedded engine over HTTP, of Transformers `generate` in process, and of vLLM over HTTP.

    python bench/engine.py [--rounds 3] [--concurrency 64 256] [--new_tokens 128] [--vllm_python PATH] [--busy]

One model, one set of prompts, 64 and 256 requests at once, sampled at temperature 1 with log-probabilities, all sides
interleaved in one run, each when the machine has become idle. `generate` gets the whole batch at once, its best case.
vLLM is measured where the Python given (by default this one) has it. The embedded engine runs as it does by default;
each peer runs in bfloat16 and in float32, and the faster of the two counts. Prints a table of medians and, last, one
line of JSON; a side not installed is null.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import torch
from about import about
from models import save_bench_model
from processes import ENVIRONMENT, KEY, START_DEADLINE, add_busy, rollout_server, start, wait_for_quiet
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

PROMPT_TOKENS = 64
PEER_DTYPES = ("bfloat16", "float32")


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts, all different."""
    source = random.Random(seed)
    return [[source.randrange(3, 99) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def ask(url: str, model: str, prompts: list[list[int]], new_tokens: int) -> int:
    """Send all prompts at once; the number of tokens that came back."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers={"Authorization": f"Bearer {KEY}"}
    ) as session:

        async def one(prompt: list[int]) -> int:
            body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 1.0, "logprobs": 0,
                    "return_token_ids": True}  # fmt: skip
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                return len((await answer.json())["choices"][0]["token_ids"])

        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def http_side(url: str, model: str, new_tokens: int) -> Callable[[list[list[int]]], float]:
    """Measure a server: tokens per second."""

    def run(prompts: list[list[int]]) -> float:
        started = time.perf_counter()
        tokens = asyncio.run(ask(url, model, prompts, new_tokens))
        assert tokens == len(prompts) * new_tokens, tokens
        return tokens / (time.perf_counter() - started)

    return run


def generate_side(model: Path, dtype: str, new_tokens: int) -> Callable[[list[list[int]]], float]:
    """Measure Transformers' `generate` on the whole batch: tokens per second."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            out = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=True, temperature=1.0,
                top_k=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            # The log-probability of each token, which every other side gives too.
            for step, logits in enumerate(out.logits):
                torch.log_softmax(logits.float(), -1).gather(1, out.sequences[:, PROMPT_TOKENS + step, None])
        return len(prompts) * new_tokens / (time.perf_counter() - started)

    return run


@contextlib.contextmanager
def stock_server(python: str, model: Path, dtype: str, log: Path) -> Iterator[str]:
    """vLLM's own server, healthy, as long as the block lasts; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", dtype, "--max-num-seqs", "256", "--max-model-len", "512"),
    ]
    # Its own environment, in which idle threads spin, as it is started by its users.
    environment = {**os.environ, **{name: ENVIRONMENT[name] for name in ("HF_HUB_OFFLINE", "OUTRIDER_API_KEY")},
                   "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    server = start(command, None, log, environment)

    async def healthy() -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=2)
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url}/health") as answer:
                return answer.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return False

    try:
        until = time.monotonic() + START_DEADLINE
        while not asyncio.run(healthy()):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def has_vllm(python: str) -> bool:
    """Whether that Python can import vLLM."""
    return subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Measure all sides, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256], help="requests at once")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--vllm_python", default=sys.executable)
    add_busy(parser)
    options = parser.parse_args()
    new_tokens = options.new_tokens
    results: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        place = Path(directory)
        model = save_bench_model(place / "model")
        _, ours = stack.enter_context(rollout_server(model, place / "ours.log"))
        sides = {"outrider": http_side(ours, str(model), new_tokens)}
        for dtype in PEER_DTYPES:
            sides[f"generate {dtype}"] = generate_side(model, dtype, new_tokens)
        for dtype in PEER_DTYPES if has_vllm(options.vllm_python) else ():
            server = stock_server(options.vllm_python, model, dtype, place / f"vllm-{dtype}.log")
            sides[f"vllm {dtype}"] = http_side(stack.enter_context(server), str(model), new_tokens)
        for round_ in range(options.rounds + 1):
            for count in options.concurrency:
                for name, run in sides.items():
                    wait_for_quiet(options.busy)
                    speed = run(make_prompts(count, seed=round_))
                    if round_:  # the first round warms up
                        results.setdefault((name, count), []).append(speed)
                        print(f"{name} {count}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
    table = Table("side", *(f"{count} at once, tokens/s" for count in options.concurrency), title="medians")
    median = {key: statistics.median(values) for key, values in results.items()}
    for name in sides:
        table.add_row(name, *(f"{median[name, count]:,.0f}" for count in options.concurrency))
    Console(highlight=False).print(table)
    summary: dict[str, float | None] = {}
    for peer in ("generate", "vllm"):
        for count in options.concurrency:
            theirs = [median[key] for dtype in PEER_DTYPES if (key := (f"{peer} {dtype}", count)) in median]
            ratio = median["outrider", count] / max(theirs) if theirs else None
            summary[f"ratio_{peer}_{count}"] = ratio and round(ratio, 3)
    summary |= {
        f"tokens_per_second_{name.replace(' ', '_')}_{count}": round(value) for (name, count), value in median.items()
    }
    print(json.dumps({**summary, **about()}))


if __name__ == "__main__":
    main()
