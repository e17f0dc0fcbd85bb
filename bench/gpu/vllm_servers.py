"""vLLM servers on GPUs for the benches here: ours and the stock one, models of known shapes without their weights, and
load from several client processes."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from transformers import AutoTokenizer, Qwen3Config

import outrider.demo
from outrider.contract.generation import PACKED_MEDIA_TYPE, PackedCompletion

KEY = "bench"
START_DEADLINE = 420.0
PROMPT_TOKENS = 64
CLIENTS = 4

#: hidden size, intermediate size, layers, heads, key-value heads, tied embeddings: those of Qwen3.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
}


def save_shape(directory: Path, shape: str) -> Path:
    """A model directory without weights: servers make them up (``--load-format dummy``)."""
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(Path(outrider.demo.__file__).parent / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    return directory


@dataclass
class Side:
    """A server. ours: it speaks the packed form of answers."""

    name: str
    model: Path
    ours: bool
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + START_DEADLINE
        while not asyncio.run(_healthy(self.url)):
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.3)


async def _healthy(url: str) -> bool:
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url}/health") as answer:
            return answer.status == 200
    except (TimeoutError, aiohttp.ClientError):
        return False


@contextlib.contextmanager
def server(
    name: str,
    model: Path,
    directory: Path,
    *flags: str,
    ours: bool,
    gpus: str = "0",
    environment: dict[str, str] | None = None,
) -> Iterator[Side]:
    """Start one, not yet ready; ended with the block."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends as well
    port = free_port()
    if ours:
        command = [sys.executable, "-m", "outrider.cli.main", "rollout", "--engine", "vllm", "--drain_timeout", "0"]
    elif "--api-server-count" in flags:  # only vLLM's own command heeds it
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "--disable-uvicorn-access-log"]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    wanted = {
        **os.environ, "OUTRIDER_API_KEY": KEY, "CUDA_VISIBLE_DEVICES": visible(gpus), "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", **(environment or {}),
    }  # fmt: skip
    log = directory / f"{name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=wanted, start_new_session=True)
    try:
        yield Side(name, model, ours, port, process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def visible(gpus: str) -> str:
    """What a process that is to see those of this one's GPUs is told."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ",".join(shown.split(",")[int(gpu)] for gpu in gpus.split(",")) if shown else gpus


def until_ended(process: int | None) -> None:
    """Wait for a process that uses the GPUs, so that servers can start beside it and are measured after it."""
    while process is not None and Path(f"/proc/{process}/cmdline").exists():
        time.sleep(0.5)


def free_port() -> int:
    """Of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts, all different."""
    source = random.Random(seed)
    return [[source.randrange(3, 99) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def load(sides: list[Side], requests: int, running: int, new_tokens: int) -> float:
    """Tokens per second of all ``sides`` together: ``requests`` spread over them, ``running`` at once."""
    jobs = []
    for number in range(CLIENTS):
        side = sides[number % len(sides)]
        share = prompts(requests // CLIENTS, number)
        jobs.append((side.url, str(side.model), side.ours, share, running // CLIENTS, new_tokens))
    with ProcessPoolExecutor(CLIENTS) as pool:
        list(pool.map(_warm, range(CLIENTS)))  # started before the clock is
        started = time.perf_counter()
        tokens = sum(pool.map(_client, jobs))
        return tokens / (time.perf_counter() - started)


def _warm(_: int) -> None:
    time.sleep(0.2)


def _client(job: tuple[str, str, bool, list[list[int]], int, int]) -> int:
    return asyncio.run(_ask(*job))


async def _ask(url: str, model: str, ours: bool, batch: list[list[int]], running: int, new_tokens: int) -> int:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | (
        {"Accept": PACKED_MEDIA_TYPE} if ours else {}
    )
    places = asyncio.Semaphore(running)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(600)
    ) as session:

        async def one(prompt: list[int]) -> int:
            body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 1.0,
                                    "logprobs": 0, "return_token_ids": True, "ignore_eos": True}  # fmt: skip
            async with places, session.post(f"{url}/v1/completions", data=json.dumps(body)) as answer:
                content = await answer.read()
                if answer.status != 200:
                    raise SystemExit(content.decode(errors="replace"))
            if ours:
                return msgspec.msgpack.decode(content, type=PackedCompletion).usage.completion_tokens
            return len(json.loads(content)["choices"][0]["token_ids"])

        return sum(await asyncio.gather(*(one(prompt) for prompt in batch)))
