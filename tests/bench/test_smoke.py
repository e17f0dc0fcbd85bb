"""The benches run on a CPU: small, and on a machine that does something else as well, so their figures say nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[2]
#: Seconds after which a bench is taken for stuck, on a busy machine too.
PATIENCE = 300.0
#: In place of a Python that has TRL, or vLLM: it can import nothing.
NONE = "false"

#: The longest first. A bench's name and options, and keys of its line of JSON.
BENCHES: dict[str, tuple[str, set[str]]] = {
    "overlap": (
        "--rounds 1 --steps 3 --prompts 2 --completions 4 --new_tokens 8 --silent 0.5 --micro_batches 1",
        {"efficiency_k2", "efficiency_k0", "generate_alone_seconds", "train_alone_seconds", "collector_share_k2"},
    ),
    "learning": (
        f"--seeds 0 --bounds --steps 2 --every 1 --prompts 8 --completions 4 --held_out 20 --trl_python {NONE}",
        {"speedup_k2_over_k0", "speedup_over_trl", "seconds_to_target", "final_accuracy", "step_seconds"},
    ),
    "soak": ("--minutes 0.05", {"sound", "wrong", "unanswered", "front_mib", "replica_mib", "front_files"}),
    "saving": (
        "--processes 2 --window 2 --rounds 2 --rollouts 8 --tokens 8",
        {"window", "rounds", "processes_2"},
    ),
    "weight_sync": (
        "--engines torch --updates 1 --rounds 1 --busy",
        {"embedded_staged_stall_ms", "embedded_staged_late_ms"},
    ),
    "staleness": ("--bounds 0 --seeds 0 --steps 2", {"k0"}),
    "engine": (
        f"--rounds 1 --concurrency 2 --new_tokens 8 --vllm_python {NONE} --busy",
        {"ratio_generate_2", "ratio_vllm_2", "tokens_per_second_outrider_2"},
    ),
    "collector": (
        "--rounds 1 --seconds 0.5 --in_flight 100 --servers 1 --num_generations 8",
        {"in_flight", "rollouts_per_second", "cost_ratio_100_to_100"},
    ),
}

Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All of them, two at a time: much of the time of each is that of one process which starts."""
    directory = tmp_path_factory.mktemp("bench")

    def run(name: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *BENCHES[name][0].split()]
        return subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(run, name) for name in BENCHES}


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_ends_with_what_it_promises(name: str, runs: Runs) -> None:
    done = runs[name].result()
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert BENCHES[name][1] <= found.keys()
