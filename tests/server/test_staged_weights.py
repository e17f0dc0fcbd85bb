"""The two sets of weights of the embedded engine, when staging and committing meet or go wrong."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from outrider.contract.manifest import Manifest
from outrider.server.engine import Conflict
from outrider.server.torch_engine import weights as module
from outrider.server.torch_engine.weights import StagedWeights
from outrider.weights.publish import Publisher


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher({"weight": torch.ones(2, 3)}, "float32", "staged", "f", None)
    yield publisher
    publisher.close()


@pytest.fixture
def staged() -> StagedWeights:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return StagedWeights(layer, "f")


def values(weights: StagedWeights) -> list[float]:
    return weights.live["weight"].unique().tolist()


def fetch_with(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    fetch = module.fetch_tensors

    def fetch_tensors(manifest: Manifest, targets: dict[str, Tensor], key: str) -> None:
        before()
        fetch(manifest, targets, key)

    monkeypatch.setattr(module, "fetch_tensors", fetch_tensors)


def test_nothing_is_committed_while_the_next_version_is_being_staged(
    staged: StagedWeights, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idle set then holds a part of each version."""
    first, second = publisher.publish(1).result(), publisher.publish(2).result()
    staged.stage(first, "")
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(60)

    fetch_with(monkeypatch, wait)
    thread = threading.Thread(target=staged.stage, args=(second, ""))
    thread.start()
    try:
        assert begun.wait(60)
        for version in (1, 2):
            with pytest.raises(Conflict, match="nothing is staged"):
                staged.commit("staged", version)
        assert values(staged) == [0]
    finally:
        go_on.set()
        thread.join(60)
    assert staged.commit("staged", 2).version == 2
    assert values(staged) == [1]


def test_a_stage_that_fails_for_any_reason_is_not_left_unfinished(
    staged: StagedWeights, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no memory for it")

    manifest = publisher.publish(1).result()
    with monkeypatch.context() as patched:
        fetch_with(patched, fail)
        with pytest.raises(MemoryError):
            staged.stage(manifest, "")
    assert staged.status.state == "failed"
    assert "no memory for it" in (staged.status.error or "")
    with pytest.raises(Conflict):
        staged.commit("staged", 1)
    assert staged.stage(manifest, "").error is None


def test_an_answer_does_not_change_with_what_happens_next(staged: StagedWeights, publisher: Publisher) -> None:
    manifest = publisher.publish(1).result()
    answer = staged.stage(manifest, "")
    committed = staged.commit("staged", 1)
    with pytest.raises(Conflict):
        staged.commit("staged", 1)
    staged.stage(manifest, "")
    assert (answer.state, answer.version, committed.state, committed.version) == ("staged", 0, "idle", 1)
