"""Several processes train as one does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.server.models import save_model

ROOT = Path(__file__).parents[2]


#: beta, rollouts of a micro-batch, and a budget of tokens instead; by the number of processes.
VARIANTS = {
    1: ("0,4,0", "0.1,4,0"),
    2: ("0,4,0", "0,3,0", "0,4,64", "0.1,4,0"),
    4: ("0,4,0", "0,1,0", "0.1,4,0"),
}


def trained(model: Path, directory: Path, processes: int) -> Any:
    """Outcomes and weights of ten steps, by variant."""
    output = directory / f"{processes}.pt"
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "-m", "tests.trainer.ranks_child", str(model), str(output), *VARIANTS[processes]],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return torch.load(output)


def test_the_number_of_processes_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """Nor do packing and the size of micro-batches: ten steps, losses, norms, counts and weights."""
    model = save_model("qwen3", tmp_path / "model")
    alone = trained(model, tmp_path, 1)
    for processes in (2, 4):
        for variant, found in trained(model, tmp_path, processes).items():
            expected = alone[variant.split(",")[0] + ",4,0"]
            outcomes, others = torch.tensor(found["outcomes"]), torch.tensor(expected["outcomes"])
            torch.testing.assert_close(outcomes, others, rtol=1e-3, atol=1e-4)
            assert torch.equal(outcomes[:, 2], others[:, 2])
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)
