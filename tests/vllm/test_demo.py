"""The whole loop with vLLM: a server and a trainer as processes, and the model learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_vllm

DEADLINE = 400.0


def test_the_demo_learns(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "outrider.cli.main", "demo", "--engine", "vllm", "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.strip().splitlines()[-1])
    assert result["accuracy_after"] >= 0.85
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.4
    assert result["max_staleness_seen"] <= 2
