"""Where time goes: seconds by state, adding up to the wall clock."""

import time
from collections.abc import Iterable


class StateClock:
    """Seconds spent in each of several states. It is always in one of them, so at any moment they add up to the time
    since it was made."""

    def __init__(self, states: Iterable[str], state: str) -> None:
        self._seconds = dict.fromkeys(states, 0.0)
        self._state, self._since = state, time.monotonic()

    def enter(self, state: str) -> None:
        """From now on the state is this one."""
        if state != self._state:
            now = time.monotonic()
            self._seconds[self._state] += now - self._since
            self._state, self._since = state, now

    def seconds(self, state: str, now: float) -> float:
        """Seconds spent in ``state`` until ``now`` (of ``time.monotonic``)."""
        running = now - self._since if state == self._state else 0.0
        return self._seconds[state] + running
