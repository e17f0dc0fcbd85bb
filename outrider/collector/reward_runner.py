"""Runs reward functions beside generation: async ones on the event loop, plain ones in processes of their own."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing import get_context
from typing import Any, cast

from pebble import ProcessExpired, ProcessPool

from outrider.contract.errors import UserError
from outrider.environments.base import Rollout
from outrider.rewards.loading import Reward, load_reward
from outrider.rewards.settings import RewardSettings

#: Seconds a reward process may take to start and import its functions, on top of the first call's own time.
START_ALLOWANCE = 60.0


class RewardFailed(Exception):
    """A reward function raised, hung, died or returned something else than one number (or None) a completion."""


#: The reward functions of a worker process, by their place on the command line.
_loaded: list[Reward] = []


def _load(specs: Sequence[str], settings: RewardSettings, plugins: Sequence[str]) -> None:
    _loaded.extend(load_reward(spec, settings, list(plugins)) for spec in specs)


def _call(index: int, completions: list[str], columns: dict[str, list[Any]]) -> Any:
    return _loaded[index].function(completions, **columns)


def _nothing() -> None:
    """What a worker runs first, so that its imports are done before the first rollout comes."""


class RewardRunner:
    """Scores groups. A plain function that hangs has its process killed; the others go on."""

    def __init__(
        self, specs: Sequence[str], settings: RewardSettings, plugins: Sequence[str], timeout: float, workers: int
    ) -> None:
        """Raises UserError when a function cannot be loaded. timeout: seconds for one call."""
        self.rewards = [load_reward(spec, settings, list(plugins)) for spec in specs]
        self.names = _distinct([reward.name for reward in self.rewards], specs)
        self.timeout = timeout
        self.seconds = 0.0
        self._pool: ProcessPool | None = None
        if not all(reward.is_async for reward in self.rewards):
            # Spawned, not forked: the collector has threads, and a fork would copy their locks.
            self._pool = ProcessPool(
                max_workers=workers,
                initializer=_load,
                initargs=(list(specs), settings, list(plugins)),
                context=get_context("spawn"),
            )
            for _ in range(workers):
                self._pool.schedule(_nothing)
        self._warm_until = time.monotonic() + START_ALLOWANCE

    async def score(self, rollouts: Sequence[Rollout], prompt: str, columns: Mapping[str, Any]) -> list[list[Any]]:
        """One list of rewards for each function, one entry a rollout: float or None. Raises RewardFailed."""
        count = len(rollouts)
        arguments = {name: [value] * count for name, value in columns.items() if name != "completions"}
        arguments["prompts"] = [prompt] * count
        arguments["completion_ids"] = [rollout.tokens for rollout in rollouts]
        completions = [rollout.text for rollout in rollouts]
        started = time.monotonic()
        results = await asyncio.gather(
            *(self._one(index, completions, arguments) for index in range(len(self.rewards)))
        )
        self.seconds += time.monotonic() - started
        return list(results)

    async def _one(self, index: int, completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        reward, name = self.rewards[index], self.names[index]
        try:
            if reward.is_async:
                function = cast(Callable[..., Awaitable[Any]], reward.function)
                result = await asyncio.wait_for(function(completions, **columns), self.timeout)
            else:
                assert self._pool is not None
                allowed = self.timeout + max(0.0, self._warm_until - time.monotonic())
                future = self._pool.schedule(_call, args=(index, completions, columns), timeout=allowed)
                result = await asyncio.wrap_future(future)
                self._warm_until = 0.0
        except (TimeoutError, FutureTimeout) as error:
            raise RewardFailed(f"reward {name}: no result within --reward_timeout {self.timeout:g} s") from error
        except ProcessExpired as error:
            raise RewardFailed(f"reward {name}: its process died with exit code {error.exitcode}") from error
        except Exception as error:
            # Whatever a user's function raises costs its group and not the run.
            raise RewardFailed(f"reward {name} raised {type(error).__name__}: {error}") from error
        return check_rewards(name, result, len(completions))

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join(timeout=5)


def check_rewards(name: str, result: Any, count: int) -> list[float | None]:
    """What a function returned, as floats and Nones. Raises RewardFailed for a wrong type, length or value."""
    if isinstance(result, str) or not hasattr(result, "__len__"):
        raise RewardFailed(f"reward {name} returned {type(result).__name__}; a list of {count} numbers is needed")
    if len(result) != count:
        raise RewardFailed(f"reward {name} returned {len(result)} rewards for {count} completions")
    checked: list[float | None] = []
    for value in result:
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise RewardFailed(f"reward {name} returned {value!r}, which is neither a number nor None") from error
        if number is not None and number in (float("inf"), float("-inf")):
            raise RewardFailed(f"reward {name} returned {number}")
        checked.append(None if number is None or number != number else number)
    return checked


def _distinct(names: Sequence[str], specs: Sequence[str]) -> list[str]:
    """Names for the log; two functions of one name are told apart by their whole spec."""
    distinct = [spec if list(names).count(name) > 1 else name for name, spec in zip(names, specs, strict=True)]
    if len(set(distinct)) != len(distinct):
        raise UserError(f"--reward_funcs {' '.join(specs)}: the same function is named twice")
    return distinct
