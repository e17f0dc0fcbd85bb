"""Several processes train as one does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.models import save_model

ROOT = Path(__file__).parents[2]


def trained(model: Path, directory: Path, processes: int, *, beta: float = 0, rows: int = 4, budget: int = 0) -> Any:
    """Outcomes and weights of ten steps."""
    output = directory / f"{processes}-{beta}-{rows}-{budget}.pt"
    words = [str(model), str(beta), str(rows), str(budget), str(output)]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "-m", "tests.trainer.ranks_child", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return torch.load(output)


@pytest.mark.parametrize("beta", [0, 0.1])
def test_the_number_of_processes_changes_nothing_but_rounding(tmp_path: Path, beta: float) -> None:
    """Nor do packing and the size of micro-batches: ten steps, losses, norms, counts and weights."""
    model = save_model("qwen3", tmp_path / "model")
    expected = trained(model, tmp_path, 1, beta=beta)
    others = [(2, 4, 0), (4, 4, 0), (2, 3, 0), (4, 1, 0), (2, 4, 64)] if beta == 0 else [(2, 4, 0), (4, 4, 0)]
    for processes, rows, budget in others:
        found = trained(model, tmp_path, processes, beta=beta, rows=rows, budget=budget)
        torch.testing.assert_close(
            torch.tensor(found["outcomes"]), torch.tensor(expected["outcomes"]), rtol=1e-3, atol=1e-4
        )
        assert [outcome[2] for outcome in found["outcomes"]] == [outcome[2] for outcome in expected["outcomes"]]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)
