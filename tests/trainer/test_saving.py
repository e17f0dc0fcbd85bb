"""Checkpoints that are written beside training, by the thread that writes them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from outrider.contract.errors import UserError
from outrider.trainer import saving
from outrider.trainer.config import OptimizerConfig, RunConfig
from outrider.trainer.directories import SaveFailed
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import Share
from outrider.trainer.saving import HostCopy, Saver, patiently
from tests.server.models import DEMO_MODEL
from tests.trainer.build import make_policy


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    policy = make_policy(DEMO_MODEL)
    optimizer = make_optimizer(policy.model, OptimizerConfig())
    made = Saver(tmp_path, policy, optimizer, AutoTokenizer.from_pretrained(DEMO_MODEL), RunConfig(), Ranks())
    yield made
    made.close()


class Gate:
    """Holds up a function until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        inner = getattr(owner, name)

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(20)
            return inner(*arguments)

        monkeypatch.setattr(owner, name, held)


def first_weight(saver: Saver) -> torch.Tensor:
    return next(iter(saver.policy.model.parameters()))


def test_training_goes_on_while_a_checkpoint_is_written(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, Share, "write")
    before = first_weight(saver).detach().clone()
    saver.begin_checkpoint(4, 4, 9, 1.0)
    saver.wait_for_copy()
    with torch.no_grad():
        first_weight(saver).add_(1.0)  # the optimizer's next step
    assert gate.reached.wait(20)
    assert (saver.settled, saver.saved_step) == (False, -1)
    gate.open.set()
    saver.settle()
    assert (saver.settled, saver.saved_step) == (True, 4)
    saved = first_weight_of(tmp_path / "checkpoint-4")
    assert torch.equal(saved, before)


def first_weight_of(directory: Path) -> torch.Tensor:
    return next(iter(make_policy(directory).model.parameters()))


def test_the_optimizer_waits_for_the_copy_and_for_nothing_else(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, HostCopy, "take")
    saver.begin_checkpoint(4, 4, 9, 1.0)
    assert gate.reached.wait(20)
    waiting = threading.Thread(target=saver.wait_for_copy)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.open.set()
    waiting.join(20)
    assert not waiting.is_alive()
    saver.settle()


@pytest.mark.parametrize("culprit", ["copy", "write"])
def test_a_failure_is_told_once_and_the_next_checkpoint_is_saved(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    def failing(*arguments: Any) -> None:
        raise SaveFailed("checkpoint-1: no room")

    with monkeypatch.context() as patched:
        patched.setattr(*((HostCopy, "take") if culprit == "copy" else (Share, "write")), failing)
        saver.begin_checkpoint(1, 1, 9, 1.0)
        saver.wait_for_copy()
        with pytest.raises(SaveFailed, match="no room"):
            saver.settle()
    saver.settle()
    assert saver.saved_step == -1
    saver.begin_checkpoint(2, 2, 9, 2.0)
    saver.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_closing_waits_for_what_is_being_written(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, Share, "write")
    saver.begin_checkpoint(3, 3, 9, 1.0)
    closing = threading.Thread(target=saver.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    gate.open.set()
    closing.join(20)
    assert (tmp_path / "checkpoint-3" / "optimizer" / "00001-of-00001.safetensors").exists()


def test_the_last_saves_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY", 0.01)
    tries: list[int] = []
    notices: list[str] = []

    def save() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise SaveFailed("no room")

    patiently(save, "the last checkpoint", notices.append, lambda: False)
    assert len(tries) == 3
    assert len(notices) == 2
    assert "the last checkpoint could not be saved: no room; free space" in notices[0]


def test_who_is_in_a_hurry_is_told_what_is_lost() -> None:
    def save() -> None:
        raise SaveFailed("no room")

    with pytest.raises(UserError, match="the final model could not be saved: no room; free space, then go on with"):
        patiently(save, "the final model", pytest.fail, lambda: True)
