"""The whole loop on two GPUs: a vLLM server on one, the trainer on the other, K = 2.

    python bench/gpu/end_to_end.py OUT.json [--shape 1.7B] [--steps 8]

64 prompts x 8 completions x 512 tokens a step, none of which ends earlier; random weights in the shape of Qwen3,
bfloat16 on the server, float32 master weights. Seconds of a step are wall clock over the measured steps divided by
their number, after as many as use up what the server has generated while the trainer's first steps compiled. Then the
two sides alone: a trainer that takes batches and computes nothing, and one that trains the same batches without a
server; efficiency is the longer of these over the step. The two run at the same time, as both sides did before: they
use different GPUs. On one GPU, or none, both sides share it: that is for trying the script, with --shape tiny.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_servers import KEY, SHAPES, save_shape, server, visible

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about
from overlap import write_prompts

HERE = Path(__file__).parents[1]
STALENESS = 2
#: The first step compiles, while the server generates STALENESS + 1 batches. Where it is the slower side, the trainer
#: lives on them for some steps more. At the end it has nothing to generate for as many.
WARM_UP = 2 * (STALENESS + 1)
#: So small that a CPU does it.
SHAPES["tiny"] = (64, 128, 2, 4, 2, True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="1.7B")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--max_num_seqs", type=int, default=512, help="of the server")
    given = parser.parse_args()
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        model = save_shape(directory / "model", given.shape)
        with torch.device("cuda:0" if gpus else "cpu"):
            made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        made.save_pretrained(model)
        del made
        if gpus:
            torch.cuda.empty_cache()
        write_prompts(directory / "prompts.jsonl", 4096, 16, 0.0)
        limit = given.new_tokens + 64
        flags = ["--max_model_len", str(limit), "--max_num_seqs", str(given.max_num_seqs)]
        with server("server", model, directory, *flags, ours=True, gpus=str(min(gpus - 1, 1) if gpus else 0)) as side:
            side.wait()
            words = trainer_flags(given, model, directory, side.port)
            result: dict[str, Any] = {
                **about(), "shape": given.shape, "prompts": given.prompts, "completions": given.completions,
                "new_tokens": given.new_tokens, "max_num_seqs": given.max_num_seqs,
            }  # fmt: skip
            ours = [sys.executable, "-m", "outrider.cli.main", "train", *words]
            result |= {"k2": summary(run(directory / "k2", ours), given.steps)}
            result["seconds_per_step"] = result["k2"]["seconds_per_step"]
            given.out.write_text(json.dumps(result, indent=1))
            part = [sys.executable, str(HERE / "trainers.py")]
            replay = [*part, "replay", str(directory / "k2" / "ledger.sqlite"), *words]
            with ThreadPoolExecutor() as pool:
                train = pool.submit(run, directory / "train", replay) if gpus > 1 else None
                consumed = run(directory / "generate", [*part, "consume", *words])
                result["generate_alone"] = summary(consumed, given.steps)
                given.out.write_text(json.dumps(result, indent=1))
                replayed = train.result() if train else None
        result["train_alone"] = summary(replayed or run(directory / "train", replay), given.steps)
        alone = max(result[kind]["seconds_per_step"] for kind in ("generate_alone", "train_alone"))
        result["efficiency"] = round(alone / result["seconds_per_step"], 3)
    given.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def trainer_flags(given: argparse.Namespace, model: Path, directory: Path, port: int) -> list[str]:
    rollouts = given.prompts * given.completions
    flags: dict[str, object] = {
        "model": model, "vllm_server_port": port, "vllm_server_api_key": KEY, "dataset": directory / "prompts.jsonl",
        "dataset_shuffle": "false", "reward_funcs": f"{HERE / 'rewards.py'}:varied",
        "num_generations": given.completions, "per_device_train_batch_size": rollouts,
        "max_tokens_per_micro_batch": given.tokens, "max_completion_length": given.new_tokens, "temperature": 1.0,
        "loss_type": "dapo", "beta": 0, "learning_rate": 1e-6, "max_staleness": STALENESS,
        "max_steps": given.steps + WARM_UP + STALENESS + 1, "save_steps": 0, "panel": "off",
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run(place: Path, command: list[str]) -> list[dict[str, Any]]:
    """The rows of its steps. Raises SystemExit when it fails."""
    ended = subprocess.run(
        [*command, "--output_dir", str(place)],
        env={**os.environ, "NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": visible("0")}, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"{place.name} ended with status {ended.returncode}: {(ended.stdout + ended.stderr)[-3000:]}")
    for saved in (place / "final", *place.glob("checkpoint-*")):  # tens of GB, in memory
        shutil.rmtree(saved)
    rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "grad_norm" in row]


def summary(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of the measured steps: seconds, and which shares of them each side had nothing to do."""
    window = rows[WARM_UP : WARM_UP + steps]
    seconds = (window[-1]["time"] - rows[WARM_UP - 1]["time"]) / len(window)
    batches = sum(row["batch_seconds"] for row in window)
    return {
        "seconds_per_step": round(seconds, 3), "all_seconds": [round(row["seconds"], 2) for row in window],
        "trainer_idle_share": round(sum(row["wait_seconds"] for row in window) / (seconds * len(window)), 3),
        "server_idle_share": round(sum(row["generation_idle_seconds"] for row in window) / max(batches, 1e-9), 3),
        "tokens_per_second": round(statistics.mean(row["rollout_tokens"] for row in window) / seconds),
        "logprob_gap": round(statistics.mean(row["logprob_gap"] for row in window), 5),
    }  # fmt: skip


if __name__ == "__main__":
    main()
