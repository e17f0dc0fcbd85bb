"""Several processes train as one does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.models import save_model

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[2]


#: beta, rollouts of a micro-batch, a budget of tokens instead, and whether weights are in host memory, micro-batches
#: flat, activations computed again or weights held over a step; by processes, copies of the model and processes that
#: compute layers together.
VARIANTS = {
    (1, 1, 1): ("0,4,0", "0.1,4,0", "0.1,4,0,offload", "0.1,4,0,varlen", "0.1,4,0,reshard"),
    (2, 1, 1): ("0,4,0", "0,3,0", "0,4,64", "0.1,4,0", "0.1,4,0,offload", "0,4,64,varlen", "0.1,4,0,hold"),
    (4, 1, 1): ("0,4,0", "0,1,0", "0.1,4,0,varlen"),
    (4, 2, 1): ("0.1,4,0", "0.1,4,0,hold"),
    (2, 1, 2): ("0,4,0", "0.1,4,0,offload", "0,4,64,varlen,recomputed", "0,4,64,hold"),
    (4, 1, 2): ("0.1,3,0", "0.1,3,0,hold"),
    (4, 2, 2): ("0,4,0,offload",),
}

#: Of how far weights have come, in ten steps: by how much they may differ.
ROUNDING = 2e-5


def trained(
    model: Path, directory: Path, processes: int, copies: int, peers: int, variants: tuple[str, ...] = ()
) -> Any:
    """Outcomes and weights of ten steps, by variant."""
    variants = variants or VARIANTS[processes, copies, peers]
    output = directory / f"{processes}.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ended = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ()),
         "-m", "tests.trainer.ranks_child", str(model), str(output), str(copies), str(peers), *variants],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return torch.load(output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(model, tmp_path_factory.mktemp("alone"), 1, 1, 1)


@pytest.mark.parametrize(("processes", "copies", "peers"), list(VARIANTS))
def test_the_number_of_processes_changes_nothing_but_rounding(
    model: Path, alone: Any, tmp_path: Path, processes: int, copies: int, peers: int
) -> None:
    """Nor do packing, the size of micro-batches, copies of the model and offloading: ten steps, losses, norms, counts
    and weights."""
    assert_alike(alone if processes == 1 else trained(model, tmp_path, processes, copies, peers), alone, model)


@pytest.mark.parametrize("kind", ["qwen2", "olmo2"])
def test_other_plans_of_sharing_out_a_block(kind: str, tmp_path: Path) -> None:
    """With biases; and with columns that all peers need, since what norms them wants all heads."""
    other = save_model(kind, tmp_path / kind)
    alone = trained(other, tmp_path, 1, 1, 1, ("0,4,0",))
    assert_alike(trained(other, tmp_path, 2, 1, 2, ("0,4,0",)), alone, other)


def assert_alike(variants: Any, alone: Any, model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = {name: weight.detach() for name, weight in whole.named_parameters()}
    for variant, found in variants.items():
        expected = alone[variant.split(",")[0] + ",4,0"]
        outcomes, others = torch.tensor(found["outcomes"]), torch.tensor(expected["outcomes"])
        # Before anything has been rounded twice: the same sums, taken in another order.
        torch.testing.assert_close(outcomes[0], others[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outcomes, others, rtol=1e-4, atol=1e-4)
        assert torch.equal(outcomes[:, 2], others[:, 2])
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
        assert distance(found["weights"], expected["weights"]) <= ROUNDING * distance(expected["weights"], start)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Between two sets of weights."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
