"""Runs reward functions beside generation: async ones on the event loop, plain ones in processes of their own."""

import asyncio
import inspect
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing import get_context
from typing import Any, cast

from pebble import ProcessExpired, ProcessPool

from outrider.contract.errors import UserError
from outrider.environments.base import Rollout
from outrider.rewards.loading import Reward, load_reward
from outrider.rewards.settings import RewardSettings


class RewardFailed(Exception):
    """A reward function raised, hung, died or returned something else than one number (or None) a completion."""


#: Seconds between looks whether the pool of workers is still one.
_LOOK = 1.0

#: The reward functions of a worker process, by their place on the command line; or why there are none.
_loaded: list[Reward] = []
_load_problem = ""


def _load(specs: Sequence[str], settings: RewardSettings, plugins: Sequence[str]) -> None:
    """Prepare a worker. Raises nothing: a worker that cannot start would be started again for ever, unheard."""
    global _load_problem
    try:
        _loaded.extend(load_reward(spec, settings, list(plugins)) for spec in specs)
    except BaseException as error:  # noqa: BLE001
        _load_problem = f"it cannot be loaded in a process of its own: {error}"


def _timed_call(
    index: int, name: str, completions: list[str], columns: dict[str, list[Any]]
) -> tuple[list[float | None] | str, float]:
    """See :func:`_call`, and the seconds that it took."""
    started = time.monotonic()
    outcome = _call(index, name, completions, columns)
    return outcome, time.monotonic() - started


def _call(index: int, name: str, completions: list[str], columns: dict[str, list[Any]]) -> list[float | None] | str:
    """The rewards, or in words why there are none: a user's exception or object need not survive the way back, and
    one that does not breaks the pool for good."""
    if _load_problem:
        return f"reward {name}: {_load_problem}"
    try:
        result = _loaded[index].function(completions, **_as_lists(columns))
        return check_rewards(name, result, len(completions))
    except RewardFailed as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a reward costs its group, too
        return _raised(name, error)


def _as_lists(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns as functions get them: token ids are lists of int there, as everywhere else in the world."""
    if "completion_ids" not in columns:
        return columns
    return {**columns, "completion_ids": [list(tokens) for tokens in columns["completion_ids"]]}


def accepted_columns(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the columns that a reward function takes beside the completions; None: all there are."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a callable written in C does not tell
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters[1:])


async def _await(call: Awaitable[Any]) -> Any:
    """Await a user's coroutine; its sys.exit() is not to end the event loop."""
    try:
        return await call
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def _raised(name: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost line that is not of a library: usually the user's own.
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"reward {name} raised {type(error).__name__}: {error}{where}"


def _nothing() -> None:
    """What a worker runs first, so that its imports are done before the first rollout comes."""


class RewardRunner:
    """Scores groups. A plain function that hangs has its process killed; the others go on.

    seconds: that all calls have computed since the start, without their time in the queue. running: groups being
    scored. switched: called when that becomes none, or one again.
    """

    def __init__(
        self, specs: Sequence[str], settings: RewardSettings, plugins: Sequence[str], timeout: float, workers: int
    ) -> None:
        """Raises UserError when a function cannot be loaded. timeout: seconds for one call."""
        self.rewards = [load_reward(spec, settings, list(plugins)) for spec in specs]
        self.names = _distinct([reward.name for reward in self.rewards], specs)
        self.timeout = timeout
        self.seconds, self.running = 0.0, 0
        self.switched: Callable[[], None] = lambda: None
        self._accepted = [accepted_columns(reward.function) for reward in self.rewards]
        self._workers, self._to_load = workers, (list(specs), settings, list(plugins))
        self._pool = None if all(reward.is_async for reward in self.rewards) else self._make_pool()

    def _make_pool(self) -> ProcessPool:
        # Spawned, not forked: the collector has threads, and a fork would copy their locks.
        pool = ProcessPool(
            max_workers=self._workers, initializer=_load, initargs=self._to_load, context=get_context("spawn")
        )
        for _ in range(self._workers):
            pool.schedule(_nothing)
        return pool

    async def score(self, rollouts: Sequence[Rollout], prompt: str, columns: Mapping[str, Any]) -> list[list[Any]]:
        """One list of rewards for each function, one entry a rollout: float or None. Raises RewardFailed."""
        count = len(rollouts)
        arguments = {name: [value] * count for name, value in columns.items() if name != "completions"}
        arguments["prompts"] = [prompt] * count
        arguments["completion_ids"] = [rollout.tokens for rollout in rollouts]
        completions = [rollout.text for rollout in rollouts]
        self._count(1)
        try:
            results = await asyncio.gather(
                *(self._one(index, completions, arguments) for index in range(len(self.rewards)))
            )
        finally:
            self._count(-1)
        return list(results)

    def _count(self, change: int) -> None:
        before, self.running = self.running, self.running + change
        if not before or not self.running:
            self.switched()

    async def _one(self, index: int, completions: list[str], arguments: dict[str, list[Any]]) -> list[float | None]:
        reward, name, accepted = self.rewards[index], self.names[index], self._accepted[index]
        columns = {key: column for key, column in arguments.items() if accepted is None or key in accepted}
        try:
            if reward.is_async:
                function = cast(Callable[..., Awaitable[Any]], reward.function)
                started = time.monotonic()
                result = await asyncio.wait_for(_await(function(completions, **_as_lists(columns))), self.timeout)
                self.seconds += time.monotonic() - started
                return check_rewards(name, result, len(completions))
            try:
                outcome, seconds = await self._in_a_worker(index, name, completions, columns)
            except (RuntimeError, ProcessExpired) as error:
                # A worker that ends while it has nothing to do breaks the pool, and all its calls; and SIGTERM comes
                # from a cluster that ends every process of a job, not from the function.
                if isinstance(error, ProcessExpired) and error.exitcode != -signal.SIGTERM:
                    raise
                outcome, seconds = await self._in_a_worker(index, name, completions, columns)
            self.seconds += seconds
        except RewardFailed:
            raise
        except (TimeoutError, FutureTimeout) as error:
            raise RewardFailed(f"reward {name}: no result within --reward_timeout {self.timeout:g} s") from error
        except ProcessExpired as error:
            raise RewardFailed(f"reward {name}: its process died with exit code {error.exitcode}") from error
        except Exception as error:
            # Whatever a user's function raises costs its group and not the run.
            raise RewardFailed(_raised(name, error)) from error
        if isinstance(outcome, str):
            raise RewardFailed(outcome)
        return outcome

    async def _in_a_worker(self, *call: Any) -> tuple[list[float | None] | str, float]:
        """Raises RuntimeError when the pool is broken, and has a new one made."""
        assert self._pool is not None
        pool = self._pool
        try:
            # The time counts from when a worker takes the call, so neither its start nor the queue goes into it.
            answer = asyncio.wrap_future(pool.schedule(_timed_call, args=call, timeout=self.timeout))
            try:
                while not (await asyncio.wait({answer}, timeout=_LOOK))[0]:
                    if not pool.active:  # it forgets calls that no worker had been handed
                        raise RuntimeError("the pool of reward workers is broken")
                return answer.result()
            finally:
                answer.cancel()
        except RuntimeError:
            if self._pool is pool:
                self._pool = self._make_pool()
                # Ends its other workers. On a thread: what it still writes to one that is gone may take for ever.
                pool.stop()
                threading.Thread(target=pool.join, daemon=True).start()
            raise

    def close(self) -> None:
        """End the worker processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join(timeout=5)


def check_rewards(name: str, result: Any, count: int) -> list[float | None]:
    """What a function returned, as floats and Nones. Raises RewardFailed for a wrong type, length or value."""
    if isinstance(result, str | bytes | Mapping | Set) or not isinstance(result, Collection):
        raise RewardFailed(f"reward {name} returned {type(result).__name__}; a list of {count} numbers is needed")
    try:
        values = list(result)
    except TypeError as error:  # an array without dimensions
        raise RewardFailed(f"reward {name} returned {result!r}; a list of {count} numbers is needed") from error
    if len(values) != count:
        raise RewardFailed(f"reward {name} returned {len(values)} rewards for {count} completions")
    checked: list[float | None] = []
    for value in values:
        try:
            number = None if value is None else float(value)
        except Exception as error:  # float() of a user's object raises what that object likes
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
