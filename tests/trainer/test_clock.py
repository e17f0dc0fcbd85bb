import contextlib
import time
from dataclasses import asdict

import pytest

from outrider.trainer import clock
from outrider.trainer.clock import StepClock, StepTimes


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only entry."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def test_every_moment_belongs_to_the_innermost_part(hands: list[float]) -> None:
    measured = StepClock()
    hands[0] += 1
    with measured.part("wait"):
        hands[0] += 2
    with measured.part("train"):
        hands[0] += 4
        with measured.part("collate"):
            hands[0] += 8
        hands[0] += 16
    hands[0] += 32
    with measured.part("train"):
        hands[0] += 64
    times = measured.lap()
    assert times == StepTimes(wait=2, collate=8, train=84, publish_wait=0, save=0, other=33)
    assert times.whole == 127


def test_laps_follow_one_another_without_a_gap(hands: list[float]) -> None:
    measured = StepClock()
    with measured.part("save"):
        hands[0] += 3
    assert measured.lap().whole == 3
    hands[0] += 5
    with measured.part("wait"):
        hands[0] += 7
    assert measured.lap() == StepTimes(wait=7, other=5)


def test_a_part_that_raises_is_left(hands: list[float]) -> None:
    measured = StepClock()
    with contextlib.suppress(KeyError), measured.part("train"):
        hands[0] += 2
        raise KeyError
    hands[0] += 3
    assert measured.lap() == StepTimes(train=2, other=3)


def test_the_parts_add_up_to_the_wall_clock() -> None:
    started = time.monotonic()
    measured = StepClock()
    parts = 0.0
    for _ in range(20):
        with measured.part("train"), measured.part("collate"):
            time.sleep(0.001)
        times = measured.lap()
        assert times.whole == sum(asdict(times).values())
        parts += times.whole
    # Nothing is counted twice; what is not counted is this loop's own.
    assert 0.02 <= parts <= time.monotonic() - started
