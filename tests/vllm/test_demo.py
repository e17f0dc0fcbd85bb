"""The whole loop with vLLM: a server and a trainer as processes, and the model learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_vllm

DEADLINE = 400.0


def demo(directory: Path, *flags: str) -> dict[str, float]:
    """Its last line."""
    ended = subprocess.run(
        [sys.executable, "-m", "outrider.cli.main", "demo", "--engine", "vllm", "--output_dir", str(directory), *flags],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def test_the_demo_learns(tmp_path: Path) -> None:
    result = demo(tmp_path)
    assert result["accuracy_after"] >= 0.85
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.4
    assert result["max_staleness_seen"] <= 2


@pytest.mark.parametrize(("ranks", "engines"), [(2, 1), (1, 2), (2, 2)], ids=["tp", "dp", "tp and dp"])
def test_a_short_demo_learns_in_parallel(tmp_path: Path, ranks: int, engines: int) -> None:
    parallel = ("--tensor_parallel_size", str(ranks), "--data_parallel_size", str(engines))
    result = demo(tmp_path, "--steps", "10", *parallel)
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.2
    assert result["max_staleness_seen"] <= 2
