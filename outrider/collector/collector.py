"""Keeps rollouts in flight, forms batches of what is finished, and ships them."""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from outrider.algorithm.advantages import combine_rewards
from outrider.collector.admission import Gate, choose_batch
from outrider.collector.config import CollectorSpec
from outrider.collector.evaluation import with_prompt
from outrider.collector.groups import Group, mini_batches, set_advantages
from outrider.collector.ledger import Backlog, Ledger
from outrider.collector.pool import Pool, RolloutFailed
from outrider.collector.prompts import Order, OverlongPrompt, Prompt, PromptSet
from outrider.collector.reward_runner import RewardFailed, RewardRunner
from outrider.collector.server import Server
from outrider.collector.stats import Tally, idle_share, mean_seconds
from outrider.contract.errors import UserError
from outrider.contract.feed import Batch, Failure, FromCollector, Notice, PoolStatus
from outrider.contract.generation import CompletionRequest
from outrider.environments.base import Completion, Environment

log = logging.getLogger(__name__)

#: Groups started before anything else gets its turn, so that what comes in does not wait for thousands to start.
BURST = 32
#: Rows of the dataset read at once.
ROWS_AHEAD = 64


class Collector:
    """The groups of a run, from admission to shipping. Everything runs on one event loop."""

    def __init__(
        self,
        spec: CollectorSpec,
        prompts: PromptSet,
        pool: Pool,
        rewards: RewardRunner,
        environment: Environment,
        ledger: Ledger,
        template: CompletionRequest,
        send: Callable[[FromCollector], None],
    ) -> None:
        """template: sampling parameters of training rollouts. send: hands a message to the trainer."""
        self.spec, self.prompts, self.pool, self.rewards = spec, prompts, pool, rewards
        self.environment, self.ledger, self.template, self.send = environment, ledger, template, send
        self.gate = Gate(spec.groups_per_batch, spec.max_staleness)
        self.order = Order(len(prompts), spec.seed, spec.data.dataset_shuffle)
        self.finished: dict[int, Group] = {}
        self.tally = Tally(pool, rewards)
        self.changed = asyncio.Event()
        self._shippable = asyncio.Event()
        self._next_group = 0
        self._again: deque[int] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty_batches = self._failures_in_a_row = self._rejected_in_a_row = self._resampled = 0
        self._tokens = 0

    async def run(self, first: int, end: int) -> None:
        """Collect the batches ``first`` to ``end`` - 1, until cancelled. Raises UserError when it cannot go on."""
        self.gate.next_step, self.gate.max_steps = first, end
        self.tally.restart(time.monotonic())
        await self._take_up(self.ledger.backlog(first))
        # Side by side: while a batch waits for the ledger, rollouts are started.
        loops = [asyncio.create_task(self._keep_starting()), asyncio.create_task(self._keep_shipping())]
        try:
            await asyncio.gather(*loops)
        finally:
            tasks = [*loops, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_up(self, backlog: Backlog) -> None:
        """Go on where an earlier process of this run ended."""
        self._next_group, self._again = backlog.next_group, deque(backlog.missing)
        while self.gate.next_step in backlog.replays:
            groups = backlog.replays.pop(self.gate.next_step)
            self.gate.pending += self.spec.groups_per_batch
            self._ship(groups, time.monotonic())
        for group in backlog.finished:
            self.finished[group.id] = group
            self.gate.pending += 1

    # ---- starting ----------------------------------------------------------------------------------------------

    async def _keep_starting(self) -> None:
        while True:
            self.changed.clear()
            started = 0
            while self._start_one():
                started += 1
                if started % BURST == 0:
                    await asyncio.sleep(0)
            await self.changed.wait()

    def _start_one(self) -> bool:
        """Start the next group if it is admitted; whether there may be another one to start."""
        oldest = self.gate.oldest_admitted()
        server = None if oldest is None else self.pool.free_server(oldest)
        if server is None:
            return False
        drawn = self._draw()
        if drawn is not None:
            group_id, prompt = drawn
            deadline = self.gate.start(group_id, server.version)
            # Occupied now, not when the request goes out, so that the next group sees the load.
            server.occupy(self.spec.sampling.num_generations)
            task = asyncio.create_task(self._make_group(group_id, deadline, prompt, server))
            self._tasks.add(task)
            task.add_done_callback(self._task_ended)
        return True

    def _draw(self) -> tuple[int, Prompt] | None:
        """The next group's id and prompt; None when the prompt is too long and was rejected."""
        if self._again:
            group_id = self._again.popleft()
        else:
            group_id = self._next_group
            self._next_group += 1
        try:
            prompt = self.prompts.get(self.order.row(group_id), lambda: self.order.rows(group_id, ROWS_AHEAD))
        except OverlongPrompt as error:
            log.warning("prompt rejected: %s", error)
            self.tally.rejected += 1
            self._rejected_in_a_row += 1
            self.ledger.dropped(group_id, f"prompt rejected: {error}")
            if self._rejected_in_a_row >= len(self.prompts):
                raise UserError(f"every prompt of the dataset was rejected; the last one: {error}") from error
            return None
        self._rejected_in_a_row = 0
        return group_id, prompt

    async def _make_group(self, group_id: int, deadline: int, asked: Prompt, home: Server) -> None:
        """Sample, score and queue one group. home: the server occupied for it."""
        first: Server | None = home
        version = deadline - self.spec.max_staleness

        async def sample(prompt: Sequence[int], n: int, seed: int) -> list[Completion]:
            nonlocal first
            server, first = first, None
            # A repetition on a server that lags would make the group older than the gate has reckoned with.
            return await self.pool.complete(server, with_prompt(self.template, prompt, n, seed), at_least=version)

        seed = random.Random(f"{self.spec.seed}/{group_id}").getrandbits(62)
        try:
            rollouts = await self.environment.rollouts(asked.tokens, self.spec.sampling.num_generations, seed, sample)
            self.tally.tokens += sum(len(rollout.tokens) for rollout in rollouts)
            self._tokens += sum(len(rollout.tokens) for rollout in rollouts)
            scores = await self.rewards.score(rollouts, asked.text, asked.columns)
            rewards = combine_rewards(scores, self.spec.reward_weights)
            if np.isnan(rewards).any():
                raise RewardFailed("no reward function has an opinion on one of its rollouts")
        except (RolloutFailed, RewardFailed) as error:
            self._give_up(group_id, str(error))
            return
        per_function = dict(zip(self.rewards.names, scores, strict=True))
        group = Group(group_id, deadline, asked.text, rollouts, rewards.tolist(), per_function)
        self.gate.finish(group_id)
        self.finished[group_id] = group
        self.ledger.finished(group)
        self._failures_in_a_row = 0
        self._shippable.set()

    def _give_up(self, group_id: int, reason: str) -> None:
        """A group is lost, and the run goes on, unless nothing but that happens."""
        log.warning("group %d given up: %s", group_id, reason)
        self.send(Notice(text=f"group {group_id} given up: {reason}"))
        self.tally.failed += 1
        self._failures_in_a_row += 1
        self.gate.drop(group_id)
        self.ledger.dropped(group_id, reason)
        limit = max(16, 2 * self.spec.groups_per_batch)
        if self._failures_in_a_row >= limit:
            self.send(Failure(message=f"{limit} groups in a row were given up; the last one because: {reason}"))
        # There is room for another one, and batches that waited for its sake need not any more.
        self.changed.set()
        self._shippable.set()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a group's task failed", exc_info=error)
            self.send(Failure(message=f"collector: {type(error).__name__}: {error}"))

    # ---- shipping ----------------------------------------------------------------------------------------------

    async def _keep_shipping(self) -> None:
        while True:
            self._shippable.clear()
            await self._ship_what_is_ready()
            await self._shippable.wait()

    async def _ship_what_is_ready(self) -> None:
        while self.gate.next_step < self.gate.max_steps:
            chosen = choose_batch(self.finished.values(), self.gate)
            if chosen is None:
                return
            if self._drop_stale(chosen) or self._replace_silent(chosen) or self._drop_empty(chosen):
                self.changed.set()  # others may start in their place
                continue
            began = time.monotonic()
            for group in chosen:
                del self.finished[group.id]
            set_advantages(chosen, self.spec.rewards.scale_rewards)
            # In the ledger before it is on its way: a batch the trainer has seen is never made twice. Groups that start
            # in the meantime make no difference: their place in the queue is the same before and after the shipping.
            await asyncio.wrap_future(self.ledger.trained(self.gate.next_step, chosen))
            self._ship(chosen, began)

    def _ship(self, groups: list[Group], began: float) -> None:
        """Hand a batch to the trainer. began: when work on it did, of ``time.monotonic``."""
        number = self.gate.next_step
        self.tally.zero_variance += sum(not group.has_signal for group in groups)
        parts = mini_batches(
            groups, self.spec.mini_batches, f"{self.spec.seed}/batch {number}", self.spec.drop_zero_variance
        )
        seconds, epoch = time.monotonic() - began, self._next_group / len(self.prompts)
        self.send(Batch(number=number, mini_batches=parts, stats=self.tally.batch(number, groups, seconds, epoch)))
        self._empty_batches = self._resampled = 0
        self.gate.ship()

    def _drop_stale(self, chosen: list[Group]) -> bool:
        """The hard check behind the gate: nothing older than K ships, whatever happened before."""
        stale = [g for g in chosen if self.gate.next_step - g.oldest_version > self.gate.max_staleness]
        for group in stale:
            self.tally.stale += 1
            self._drop(group, f"stale: version {group.oldest_version} in step {self.gate.next_step}")
        return bool(stale)

    def _replace_silent(self, chosen: list[Group]) -> bool:
        """--dynamic_sample: groups without two different rewards make room for others."""
        if not self.spec.rewards.dynamic_sample:
            return False
        room = self.spec.rewards.max_resample_times * self.spec.groups_per_batch - self._resampled
        silent = [group for group in chosen if not group.has_signal][: max(room, 0)]
        for group in silent:
            self.tally.zero_variance += 1
            self._drop(group, "all rewards equal")
        self._resampled += len(silent)
        return bool(silent)

    def _drop_empty(self, chosen: list[Group]) -> bool:
        """A batch without any signal has no gradient: its groups are dropped and others take their place."""
        if not self.spec.drop_zero_variance or any(group.has_signal for group in chosen):
            return False
        self._empty_batches += 1
        for group in chosen:
            self.tally.zero_variance += 1
            self._drop(group, "all rewards equal, in a batch where this is so for every group")
        if self._empty_batches >= self.spec.staleness.max_empty_batches:
            mean = float(np.mean([group.rewards for group in chosen]))
            raise UserError(
                f"{self._empty_batches} batches in a row had no group with two different rewards (the last one's mean "
                f"reward was {mean:.3g}): nothing is left to learn, or the rewards cannot tell rollouts apart"
            )
        return True

    def _drop(self, group: Group, reason: str) -> None:
        del self.finished[group.id]
        self.gate.drop(group.id)
        self.ledger.dropped(group.id, reason, group)

    # ---- telling -----------------------------------------------------------------------------------------------

    async def report(self, interval: float = 0.5) -> None:
        """Tell the trainer about twice a second how things stand."""
        servers = self.pool.servers
        at = time.monotonic()
        busy, tokens = mean_seconds(servers, "busy", at), self._tokens
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            new_busy, elapsed = mean_seconds(servers, "busy", now), now - at
            self.send(
                PoolStatus(
                    servers_alive=sum(server.alive for server in servers),
                    servers_total=len(servers),
                    server_versions=[server.version for server in servers],
                    groups_running=len(self.gate.running),
                    groups_finished=len(self.finished),
                    rollouts_running=sum(server.running for server in servers),
                    tokens_per_second=(self._tokens - tokens) / elapsed,
                    generation_idle_share=idle_share(new_busy - busy, elapsed),
                )
            )
            busy, tokens, at = new_busy, self._tokens, now
