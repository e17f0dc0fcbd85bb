"""The trainer alone: model FLOPs utilization, memory, and what a second GPU brings.

    python bench/gpu/trainer.py OUT.json [--shapes 0.6B 1.7B] [--ranks 1 2] [--tokens 16384] [--micro_batches 4]
                                [--tensor_parallel_size 1]

Random weights in the shape of Qwen3, float32 master weights, AdamW. A step is ``--micro_batches`` micro-batches of
``--tokens`` tokens on each GPU, forward, backward and optimizer, through the trainer's own step; rollouts of 1,024
tokens, each of which is trained. FLOPs are counted as 6 x parameters x tokens, and 6 x layers x heads x width x length
of causal attention a token; the peak is 989 TFLOP/s (dense bfloat16 of an H100 or H200). Last, the peak memory of the
log-probabilities alone, at 151,936 entries of the vocabulary, against that of materialized logits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_servers import free_port, save_shape

from outrider.algorithm.losses import LossSpec
from outrider.cli.entry import leave
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.feed import MiniBatch, Sample
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, ModelConfig, OptimizerConfig
from outrider.trainer.logprobs import Head, token_logprobs
from outrider.trainer.model import Policy
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.step import StepComputer

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about

PEAK = 989e12
LENGTH = 1024
WARM_UP, STEPS = 2, 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "1.7B"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="of runs with as many ranks, or more")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time of one step goes")
    parser.add_argument("--model", type=Path, help="of a rank, which this script starts")
    given = parser.parse_args()
    if given.model is not None:
        rank(given)
        return
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    results |= about()
    for shape in given.shapes:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            model = random_weights(save_shape(Path(name) / "model", shape))
            for ranks in given.ranks:
                peers = min(given.tensor_parallel_size, ranks)
                label = f"{shape} on {ranks}" + (f", {peers} by tensor parallelism" if peers > 1 else "")
                results[label] = measured(model, ranks, peers, given)
                print(label, results[label], flush=True)
                given.out.write_text(json.dumps(results, indent=1))
        both = [results.get(f"{shape} on {ranks}", {}).get("tokens_per_second") for ranks in (1, 2)]
        if all(both):
            results[f"{shape} scaling_2"] = round(both[1] / both[0], 3)
    results |= logprob_memory()
    given.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))


def random_weights(model: Path) -> Path:
    """Beside the configuration, so that the model is loaded as any other."""
    with torch.device("cuda:0"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    made.save_pretrained(model)
    del made
    torch.cuda.empty_cache()
    return model


def measured(model: Path, ranks: int, peers: int, given: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 says."""
    port = free_port()
    words = [sys.executable, __file__, str(given.out), "--model", str(model), "--tokens", str(given.tokens),
             "--micro_batches", str(given.micro_batches), "--tensor_parallel_size", str(peers)]  # fmt: skip
    words += [f"--{name}" for name in ("checkpointing", "eager", "profile") if getattr(given, name)]
    processes = []
    for number in range(ranks):
        place = {"WORLD_SIZE": str(ranks), "RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                 "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(
            subprocess.Popen(words, env={**os.environ, **place}, stdout=subprocess.PIPE if number == 0 else None)
        )
    try:
        said, _ = processes[0].communicate(timeout=240)
        if processes[0].returncode:
            return {"failed": processes[0].returncode}
        lines = said.decode().splitlines()
        print(*lines[:-1], sep="\n")
        return json.loads(lines[-1])
    except subprocess.TimeoutExpired:
        return {"failed": "not done within 240 s"}
    finally:
        for process in processes:
            process.kill()


def rank(given: argparse.Namespace) -> None:
    """One of them."""
    started = time.monotonic()
    ranks = Ranks(peers=given.tensor_parallel_size)
    config = ModelConfig(
        model=str(given.model),
        gradient_checkpointing=given.checkpointing,
        torch_compile=False if given.eager else None,
    )
    policy = Policy(config, str(given.model), 1.0, 2048, trainable=True, ranks=ranks)
    optimizer = make_optimizer(policy.model, OptimizerConfig())
    computer = StepComputer(
        policy, None, LossSpec(loss_type="dapo", beta=0.0, max_completion_length=LENGTH),
        BatchConfig(max_tokens_per_micro_batch=given.tokens), "token_truncate", 2.0, 1.0, ranks,
    )  # fmt: skip
    loaded = time.monotonic() - started
    batch = rollouts(given.tokens // LENGTH * given.micro_batches * ranks.data_size)
    step_tokens = len(batch.samples) * LENGTH

    def step() -> float:
        began = time.monotonic()
        [work] = computer.prepare([batch], StepClock())
        outcome = computer.gradients(work, StepClock())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        assert outcome.tokens == step_tokens
        assert len(work.rounds) == given.micro_batches
        return time.monotonic() - began

    began = time.monotonic()
    for _ in range(WARM_UP):
        step()
    warm_up = time.monotonic() - began
    torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(STEPS)]
    if given.profile and ranks.leads:
        profile(step)
    elif given.profile:
        step()
    text = policy.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim * LENGTH
    rate = step_tokens / statistics.median(seconds)
    if ranks.leads:
        print(
            json.dumps(
                {
                    "mfu": round(rate / ranks.size * 6 * (parameters + attention) / PEAK, 4),
                    "tokens_per_second": round(rate), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
                    "step_seconds": [round(value, 3) for value in seconds], "flat": policy.flat,
                    "micro_batches": given.micro_batches, "tokens": given.tokens, "parameters": parameters,
                    "load_seconds": round(loaded, 1), "warm_up_seconds": round(warm_up, 1),
                    "checkpointing": given.checkpointing, "compiled": not given.eager,
                }
            )
        )  # fmt: skip
    ranks.close()


def rollouts(count: int) -> MiniBatch:
    """Random ones of LENGTH tokens, with advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        ids = torch.randint(5, 150_000, (LENGTH,), generator=generator).tolist()
        samples.append(
            Sample(
                group=index, prompt=pack_ints([3]), completion=pack_ints(ids), logprobs=pack_floats([-12.0] * LENGTH),
                advantage=1.0 if index % 2 else -1.0, mask=b"",
            )
        )  # fmt: skip
    return MiniBatch(samples=samples, sequences=count, tokens=count * LENGTH)


def profile(step: Any) -> None:
    """Kernels by the time that they take of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        step()
    rows = record.key_averages()
    total = sum(row.self_device_time_total for row in rows)
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:28]:
        share = row.self_device_time_total / total
        print(f"{100 * share:5.1f}% {row.self_device_time_total / 1000:8.1f} ms {row.count:6d} {row.key[:110]}")


def logprob_memory(tokens: int = 16384, hidden: int = 1024, vocabulary: int = 151_936) -> dict[str, float]:
    """Peak memory beside inputs and their gradients, GiB, forward and backward; and how far the weights' gradient is
    from that of materialized logits, as a share of it."""
    torch.manual_seed(0)
    inputs = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")

    def ours() -> torch.Tensor:
        return token_logprobs(inputs, targets, Head(weight, None, None), 1.0, 2048)[0]

    def materialized() -> torch.Tensor:
        return torch.log_softmax((inputs @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]

    found: dict[str, float] = {}
    gradients = []
    for name, function in (("ours", ours), ("materialized", materialized)):
        for _ in range(2):
            inputs.grad = weight.grad = None
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.monotonic()
            function().sum().backward()
            torch.cuda.synchronize()
            found[f"logprobs_{name}_ms"] = round(1000 * (time.monotonic() - began), 1)
            found[f"logprobs_{name}_peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        gradients.append(weight.grad.float())
    ours_grad, expected = gradients
    found["logprobs_gradient_difference"] = round(float((ours_grad - expected).norm() / expected.norm()), 5)
    found["logprobs_memory_share"] = round(found["logprobs_ours_peak_gib"] / found["logprobs_materialized_peak_gib"], 3)
    return found


if __name__ == "__main__":
    main()
    leave(0)
