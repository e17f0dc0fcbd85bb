"""A run with several optimizer steps a batch: two mini-batches, each trained twice."""

import shutil
from pathlib import Path

import pytest

from outrider.observe.metrics import evaluations_of, read_metrics
from outrider.trainer.optimizer import learning_rate
from tests.end_to_end.conftest import Train
from tests.end_to_end.processes import Command
from tests.end_to_end.records import check_ledger, steps, summary, trained

pytestmark = pytest.mark.runs

#: Steps a batch, and steps of the run, whose third and last batch is trained in part.
EACH, STEPS = 4, 10
FLAGS = {
    "per_device_train_batch_size": 16, "steps_per_generation": 2, "num_iterations": 2, "max_steps": STEPS,
    "save_steps": 3, "eval_steps": 3, "learning_rate": "1e-3", "epsilon": 0.1, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(train: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("batches")
    done = train(directory, **FLAGS, val_dataset=data / "heldout.jsonl").wait()
    assert (done.status, done.err) == (0, "")
    return directory / "run"


def test_steps_versions_and_batches(run: Path) -> None:
    found = steps(run)
    assert [(row.step, row.version) for row in found] == [(step, (step - 1) // EACH) for step in range(1, STEPS + 1)]
    assert (summary(run).finished, summary(run).steps, summary(run).max_staleness_seen) == (True, STEPS, 0)
    check_ledger(run, count=3, groups=8, bound=0)
    for first in range(0, STEPS, EACH):
        rows = found[first : first + EACH]
        # The first step on a batch has ratios of one, and all compare the sampler with the policy before it.
        assert rows[0].clip_low_share == rows[0].clip_high_share == 0.0
        assert all(row.logprob_gap < 1e-4 for row in rows)
        assert len({row.reward for row in rows}) == 1
    assert any(row.clip_low_share + row.clip_high_share > 0 for row in found)
    rates = [learning_rate(step, STEPS, 1e-3, 0.05, "cosine") for step in range(STEPS)]
    assert [row.learning_rate for row in found] == rates


def test_saves_and_evaluations_are_at_the_end_of_a_batch(run: Path) -> None:
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    found = evaluations_of(read_metrics(run / "metrics.jsonl"))
    assert [row.step for row in found] == [0, 4, 8, 10]
    assert [row.version_max for row in found] == [0, 1, 2, 3]


def test_show_finds_the_batch_of_a_step(run: Path) -> None:
    done = Command("outrider", ["show", str(run), "--step", "6"], run.parent).wait()
    assert (done.status, done.err) == (0, "")
    assert "Step 6, on batch 2" in done.out
    assert "32 rollouts of 8 groups" in done.out


def test_a_resumed_run_takes_the_very_same_steps(run: Path, train: Train, data: Path) -> None:
    before, rollouts = steps(run), trained(run)
    weights = (run / "final" / "model.safetensors").read_bytes()
    for name in ("checkpoint-8", "checkpoint-10", "final"):
        shutil.rmtree(run / name)
    done = train(
        run.parent, **FLAGS, val_dataset=data / "heldout.jsonl", resume_from_checkpoint="auto"
    ).wait()  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert "checkpoint-4 after step 4" in done.out
    after = steps(run)
    assert [(row.step, row.version, row.loss, row.grad_norm) for row in after] == [
        (row.step, row.version, row.loss, row.grad_norm) for row in before
    ]
    assert trained(run) == rollouts
    assert (run / "final" / "model.safetensors").read_bytes() == weights


def test_a_run_that_ended_within_a_batch_goes_on_with_the_next(run: Path, train: Train) -> None:
    done = train(run.parent, **FLAGS | {"max_steps": 14, "eval_steps": None}, resume_from_checkpoint="auto").wait()
    assert (done.status, done.err) == (0, "")
    assert [row.version for row in steps(run)] == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4
    check_ledger(run, count=4, groups=8, bound=0)
