"""What has to hold on GPUs and is no matter of speed, on two of them, against servers with vLLM.
Those of host_staging, inflight and gap need one.

    python bench/gpu/checks.py OUT.json [--only CHECK ...] [--after PID]

Tensor parallel, data parallel, and weights staged in host memory: each server starts with one set of weights,
generates, takes another one, and then answers greedily as a server does that was started from it, token for token, on
every engine. While weights change: whether the recorded versions of tokens in flight are those that drew them.
A small trained model: how far the sampler's log-probabilities are from those of Transformers. Last, short runs of the
trainer: with vLLM's own server and weights by NCCL, and with two ranks.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
from gap import ask, gap
from inflight import versions_in_flight
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from vllm_servers import Side, server, until_ended, visible

import outrider.demo
from outrider.contract import routes
from outrider.contract.arrays import unpack_ints
from outrider.contract.control import Inflight, ServerInfo
from outrider.demo.task import problems, write_jsonl
from outrider.weights.publish import Publisher

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about
from updates import KEY, call, staged_update

DEMO = Path(outrider.demo.__file__).parent / "model"
CHECKS = ["tp2", "dp2", "host_staging", "inflight", "gap", "two_ranks", "nccl"]
POLICIES: tuple[Inflight, ...] = ("keep", "recompute", "wait")
NEW_TOKENS = 48
#: Tokens of the shortest and the longest request that goes on while weights change.
IN_FLIGHT = (60, 200)
PROMPTS = [[5, 6 + number % 3, 7 + number] for number in range(16)]
ON_GPU = torch.cuda.is_available()
LAST_GPU = str(max(torch.cuda.device_count() - 1, 0))


def main(out: Path, only: list[str], after: int | None) -> None:
    result = about()
    # The check for free memory at the start counts what the other servers have.
    small = {"kv_cache_memory_bytes": 2**28}
    if ON_GPU:
        small = {"kv_cache_memory_bytes": 2**29, "gpu_memory_utilization": 0.05}
    flags = ["--engine_kwargs", json.dumps(small), "--engines_per_device", "1", "--enforce_eager", "true",
             "--max_model_len", "256", "--max_num_seqs", "64"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        old, new = (save_random(directory / f"seed{seed}", seed) for seed in (0, 1))

        def start(label: str, model: Path, *more: str, gpus: str = "0,1") -> Side:
            return stack.enter_context(server(label, model, directory, *flags, *more, ours=True, gpus=gpus))

        sides: dict[str, tuple[Side, Side]] = {}
        if "tp2" in only:
            tp2 = start("tp2", old, "--tensor_parallel_size", "2")
            sides["tp2"] = (tp2, start("tp2_fresh", new, "--tensor_parallel_size", "2"))
        if {"dp2", "host_staging"} & {*only}:
            fresh = start("fresh", new, gpus=LAST_GPU)
            if "dp2" in only:
                sides["dp2"] = (start("dp2", old, "--data_parallel_size", "2"), fresh)
            if "host_staging" in only:
                sides["host_staging"] = (start("host", old, "--weight_staging", "host", gpus=LAST_GPU), fresh)
        if "inflight" in only:
            alternating = start("inflight", old, gpus="0")
        if {"gap", "two_ranks"} & {*only}:
            demo = start("demo", DEMO, gpus=LAST_GPU)
        stock = None
        if ON_GPU and "nccl" in only:
            stock = stack.enter_context(
                server("stock", DEMO, directory, "--weight-transfer-config", '{"backend":"nccl"}', "--logprobs-mode",
                       "processed_logprobs", "--kv-cache-memory-bytes", str(2**29),
                       "--gpu-memory-utilization", "0.05", "--enforce-eager",
                       "--max-model-len", "256", "--api-key", KEY,
                       ours=False, gpus=LAST_GPU, environment={"VLLM_SERVER_DEV_MODE": "1"})
            )  # fmt: skip

        def note(label: str, check: Callable[[], Any]) -> None:
            """One that fails is reported, and the others are made."""
            try:
                result[label] = check()
            except (Exception, SystemExit) as error:  # noqa: BLE001
                result[label] = f"FAILED: {type(error).__name__}: {error}"[-3000:]
            print(label, result[label], flush=True)
            out.write_text(json.dumps(result, indent=1))

        until_ended(after)
        for label, (side, other) in sides.items():
            note(label, lambda side=side, other=other: updated(side, other, new))
        for policy in POLICIES if "inflight" in only else ():
            note(
                f"inflight_{policy}",
                lambda policy=policy: versions_in_flight(alternating, [old, new], policy, IN_FLIGHT),
            )
        if "gap" in only:
            note("gap_of_a_trained_model", lambda: trained_gap(demo))
        if "two_ranks" in only:
            note("two_ranks", lambda: trained(directory / "two", demo.port, ranks=2))
        if stock is not None:
            note("nccl", lambda: nccl(directory / "nccl", stock))
    print(json.dumps(result))


def save_random(directory: Path, seed: int) -> Path:
    """A model whose weights are random, and whose texts do not end."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if ON_GPU else torch.float32).save_pretrained(
        directory
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    return directory


def greedy(side: Side) -> list[list[int]]:
    """Two at once: each of two engines has one to answer, so that it computes with the same kernels as one alone."""
    with ThreadPoolExecutor(2) as pool:
        return [
            unpack_ints(choice.token_ids).tolist()
            for first in range(0, len(PROMPTS), 2)
            for choice in pool.map(
                lambda prompt: ask(side, prompt, NEW_TOKENS, temperature=0.0), PROMPTS[first : first + 2]
            )
        ]


def requests(side: Side) -> dict[str, int]:
    """How many each engine has answered."""
    metrics = call(side.url, routes.METRICS).decode()
    found = re.findall(r'^vllm:e2e_request_latency_seconds_count\{.*engine="(\d+)".*\} ([\d.e+]+)', metrics, re.M)
    return {engine: int(float(count)) for engine, count in found}


def updated(side: Side, fresh: Side, new: Path) -> dict[str, Any]:
    """Old answers, an update, new answers. Raises AssertionError where they are not those of ``fresh``."""
    side.wait()
    fresh.wait()
    before, expected = greedy(side), greedy(fresh)
    assert before != expected, "both sets of weights give the same answers"
    info = msgspec.json.decode(call(side.url, routes.INFO), type=ServerInfo)
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    publisher = Publisher(tensors, info.torch_dtype, uuid.uuid4().hex[:12], info.model_fingerprint, None)  # type: ignore[arg-type]
    try:
        status, _ = staged_update(side.url, publisher.publish(1).result(60))
    finally:
        publisher.close()
    answered = requests(side)
    after = greedy(side)
    by_engine = {engine: count - answered.get(engine, 0) for engine, count in requests(side).items()}
    same = sum(a == b for ours, theirs in zip(after, expected, strict=True) for a, b in zip(ours, theirs, strict=True))
    return {
        "version": status.version, "answered_by_engine": by_engine,
        "equal_tokens": same, "tokens": len(PROMPTS) * NEW_TOKENS, "changed": before != after,
        "stage_seconds": round(status.stage_seconds, 3), "commit_ms": round(1000 * status.commit_seconds, 2),
    }  # fmt: skip


def trained_gap(side: Side) -> dict[str, float]:
    """Of the demo's model, over problems of its own task."""
    side.wait()
    device = "cuda:0" if ON_GPU else "cpu"
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, attn_implementation="sdpa").eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    asked = [tokenizer(problem.prompt)["input_ids"] for problem in problems("heldout", 256, 0)]
    return gap(side, model, asked, 8, ignore_eos=False)


def trained(directory: Path, port: int, ranks: int, *more: str, gpus: str = "0,1") -> dict[str, Any]:
    """A short run on the demo's task; what its last steps and its summary say."""
    directory.mkdir()
    write_jsonl(directory / "train.jsonl", problems("train", 4000, 0))
    write_jsonl(directory / "heldout.jsonl", problems("heldout", 200, 0))
    flags: dict[str, object] = {
        "model": DEMO, "vllm_server_port": port, "vllm_server_api_key": KEY, "dataset": directory / "train.jsonl",
        "val_dataset": directory / "heldout.jsonl", "reward_funcs": "exact_match", "num_generations": 8,
        "per_device_train_batch_size": 128 // ranks, "max_completion_length": 8, "temperature": 1.0, "beta": 0,
        "max_staleness": 1, "learning_rate": 5e-4, "lr_scheduler_type": "constant", "max_steps": 20, "save_steps": 10,
        "output_dir": directory / "run", "vllm_server_timeout": 120,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "outrider.cli.main", "train", *words, *more],
        env={**os.environ, "NPROC_PER_NODE": str(ranks), "CUDA_VISIBLE_DEVICES": visible(gpus)}, capture_output=True,
        text=True, timeout=170, check=False,
    )  # fmt: skip
    log = directory / "run" / "collector.log"
    said = (ended.stdout + ended.stderr)[-2000:] + (log.read_text()[-800:] if log.exists() else "")
    assert ended.returncode == 0, f"status {ended.returncode}: {said}"
    summary = json.loads((directory / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    return {
        "seconds": round(time.monotonic() - started, 1),
        **{name: summary.get(name) for name in ("steps", "reward_before", "reward_after", "max_staleness_seen")},
        "logprob_gap": [round(row["logprob_gap"], 5) for row in steps[-3:]],
        "logprob_gap_max": round(max(row["logprob_gap_max"] for row in steps), 5),
        "step_seconds": [round(row["seconds"], 3) for row in steps[-3:]],
    }


def nccl(directory: Path, side: Side) -> dict[str, Any]:
    """Weights by NCCL to vLLM's own server on the second GPU."""
    side.wait()
    found = trained(directory, side.port, 1, "--weight_transport", "nccl", gpus="0")
    found["paused"] = json.loads(call(side.url, "/is_paused"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=CHECKS, choices=CHECKS)
    parser.add_argument("--after", type=int, help="process that is to end before anything is checked")
    given = parser.parse_args()
    main(given.out, given.only, given.after)
