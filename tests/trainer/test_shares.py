"""Models and checkpoints shared out over ranks: in real processes, compared with one process to the bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.trainer.config import OptimizerConfig
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.rows import load_rows, model_tensors, optimizer_tensors
from tests.server.models import DEMO_MODEL, save_model
from tests.trainer.build import make_policy, one_a_row, random_samples

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Untied; with buffers that checkpoints do not hold; tied."""
    directory = tmp_path_factory.mktemp("models")
    return [save_model("qwen3", directory / "qwen3"), save_model("gemma3", directory / "gemma3"), DEMO_MODEL]


def processes(
    count: int, directory: Path, copies: int, resumed: Path | None, models: list[Path], peers: int = 1
) -> Any:
    """What so many ranks had; they write into ``directory``."""
    directory.mkdir()
    output = directory.with_suffix(".pt")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
         "-m", "tests.trainer.shares_child", str(output), str(directory), str(copies), str(peers), str(resumed or ""),
         *map(str, models)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def two(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two ranks after a first step, and where they have saved."""
    directory = tmp_path_factory.mktemp("two") / "run"
    return directory, processes(2, directory, 1, None, models)


@pytest.fixture(scope="module")
def four(models: list[Path], two: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Four ranks, two to a copy of the model, that go on from there."""
    directory = tmp_path_factory.mktemp("four") / "run"
    return directory, processes(4, directory, 2, two[0] / "checkpoint-1", models[:1])


@pytest.fixture(scope="module")
def pair(models: list[Path], two: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two ranks that compute layers together and go on from there."""
    directory = tmp_path_factory.mktemp("pair") / "run"
    return directory, processes(2, directory, 1, two[0] / "checkpoint-1", models, peers=2)


@pytest.fixture(scope="module")
def pairs(models: list[Path], pair: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Four ranks, two of which compute layers together, that go on from what a pair has saved."""
    directory = tmp_path_factory.mktemp("pairs") / "run"
    return directory, processes(4, directory, 1, pair[0] / "checkpoint-1", models[:1], peers=2)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("ranks", ["two", "pair"])
def test_a_shared_model_is_the_one_that_transformers_loads(
    models: list[Path], ranks: str, request: pytest.FixtureRequest
) -> None:
    _, had = request.getfixturevalue(ranks)
    for model in models:
        found, alone = had["loaded"][str(model)], make_policy(model)
        assert_equal(found["parameters"], dict(alone.model.named_parameters()))
        assert_equal(found["buffers"], dict(alone.model.named_buffers()))
        # A pair has columns of some, and each of it the norms of blocks.
        assert ranks == "pair" or found["rows"] == sum(-(-len(value) // 2) for value in alone.model.parameters())
        assert found["sharing"] == alone.sharing
        logprobs, entropy = alone.logprobs_and_entropy(one_a_row(random_samples(4, seed=1)))
        torch.testing.assert_close(found["logprobs"], logprobs.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found["entropy"], entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ranks", "files"), [("two", 2), ("four", 2), ("pair", 2), ("pairs", 4)])
def test_one_process_reads_what_several_wrote(
    models: list[Path], ranks: str, files: int, two: tuple[Path, Any], request: pytest.FixtureRequest
) -> None:
    directory, found = request.getfixturevalue(ranks)
    path = directory / "checkpoint-1"
    # With two copies of the model, one of them is saved.
    assert [file.name for file in sorted(path.glob("model-*"))] == [
        f"model-0000{k + 1}-of-0000{files}.safetensors" for k in range(files)
    ]
    policy = make_policy(models[0])
    optimizer = make_optimizer(policy.model, OptimizerConfig())
    load_rows(path, policy.model, optimizer)
    for state in (found, two[1]):
        assert_equal(model_tensors(policy.model), state["weights"])
        assert_equal(optimizer_tensors(policy.model, optimizer), state["moments"])


@pytest.mark.parametrize("ranks", ["two", "pairs"])
@pytest.mark.parametrize("name", ["final", "checkpoint-2"], ids=["the export", "with --save_only_model"])
def test_what_several_write_without_moments_is_a_hugging_face_directory(
    name: str, ranks: str, request: pytest.FixtureRequest
) -> None:
    directory, found = request.getfixturevalue(ranks)
    loaded = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
    assert_equal(dict(loaded.named_parameters()), found["weights"])
    assert AutoTokenizer.from_pretrained(directory / name).vocab_size > 0
    assert not (directory / name / "optimizer").exists()


def test_a_rank_that_cannot_write_costs_the_checkpoint_and_nothing_else(two: tuple[Path, Any]) -> None:
    directory, found = two
    message, left = found["failed"]
    assert message.startswith(f"{directory / 'checkpoint-1'}: rank 1: "), message
    assert left == []
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint-1", "checkpoint-2", "final"]


def test_a_directory_that_is_not_shared_is_named(two: tuple[Path, Any]) -> None:
    directory, found = two
    expected = f"--output_dir {directory / 'elsewhere'} on node 0 (rank 1) is not {directory} on node 0: every rank"
    assert found["refused"].startswith(expected)
