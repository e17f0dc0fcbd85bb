"""Where the trainer's time goes: every moment of a run belongs to exactly one part."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

Part = Literal["wait", "collate", "train", "publish_wait", "save", "other"]


@dataclass
class StepTimes:
    """Seconds of one step by what they went to.

    wait: for a batch. collate: from rollouts to tensors. train: forward, backward, optimizer. publish_wait: for
    weights to be copied out. save: copying a checkpoint's contents, and waiting for the checkpoint before. other:
    everything else, records above all.
    """

    wait: float = 0.0
    collate: float = 0.0
    train: float = 0.0
    publish_wait: float = 0.0
    save: float = 0.0
    other: float = 0.0

    @property
    def whole(self) -> float:
        """From the end of the step before to the end of this one."""
        return sum(asdict(self).values())


class StepClock:
    """Hands every moment to the part that is entered, and to ``other`` where none is."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._part: Part = "other"
        self._since = time.monotonic()

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Time inside is of this part. Inside another part it is taken from that one."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def lap(self) -> StepTimes:
        """End a step: what has passed since the last one ended."""
        self._switch(self._part)
        times, self._times = self._times, StepTimes()
        return times

    def _switch(self, name: Part) -> Part:
        now = time.monotonic()
        setattr(self._times, self._part, getattr(self._times, self._part) + now - self._since)
        self._since = now
        before, self._part = self._part, name
        return before
