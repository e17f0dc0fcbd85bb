"""The embedded engine, seen from the HTTP application: replicas, and who gets which request."""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from outrider.contract.arrays import pack_ints, unpack_ints
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.errors import UserError
from outrider.contract.manifest import Manifest
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import ChoiceDelta, Conflict, EngineLoad, InvalidRequest, Unavailable
from outrider.server.torch_engine.dispatch import choose_replica, prefix_key
from outrider.server.torch_engine.host_weights import HostWeights
from outrider.server.torch_engine.loading import EnginePlan
from outrider.server.torch_engine.messages import (
    Abort,
    Commit,
    Committed,
    Crashed,
    FromReplica,
    Hello,
    Load,
    Progress,
    ReplicaSpec,
    Staged,
    Step,
    Submit,
    Update,
)
from outrider.server.torch_engine.replica_process import ReplicaProcess, replica_context
from outrider.server.torch_engine.slots import MAX_STOP_TOKENS

log = logging.getLogger(__name__)

#: Seconds for a replica to load its model, to copy a staged version, and to commit it with nothing to wait for.
LOAD_DEADLINE = 1800.0
STAGE_DEADLINE = 600.0
#: Deaths in a row after which a replica is not started anew, unless it has served for so many seconds before.
MAX_DEATHS, SERVED = 5, 5.0
#: How often one request may be issued.
MAX_ISSUES = 3


class Replica:
    """One place for a replica: the process that holds it now, and the requests that are there.

    ready: it has loaded its model and holds the weights in use. sequences, prompt_tokens: of requests that are there,
    and of those that its latest report did not know of yet. commits: commits that it still owes.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.process: ReplicaProcess | None = None
        self.ready = False
        self.requests: dict[int, TorchGeneration] = {}
        self.sequences = 0
        self.unreported_tokens = 0
        self.answer: asyncio.Future[FromReplica] | None = None
        self.deaths = 0  # in a row, none of which came after it had served for a while
        self.ready_since = math.inf
        self.before = Load()  # counters of the processes that are gone

    @property
    def load(self) -> Load:
        return self.process.load if self.process is not None else Load()

    @property
    def tokens(self) -> int:
        """Tokens that it works on, as far as is known."""
        return self.load.tokens + self.unreported_tokens

    @property
    def full(self) -> bool:
        """Whether more requests would only wait there. A few may, so that a slot that gets free is not empty for the
        time of a message."""
        return self.sequences >= self.spec.max_num_seqs + max(1, self.spec.max_num_seqs // 8)


class TorchGeneration:
    """A request being answered; see ``Generation``."""

    def __init__(self, engine: "TorchEngine", submit: Submit) -> None:
        self.engine, self.submit = engine, submit
        self.key = prefix_key(submit.prompt)
        self.replica: Replica | None = None
        self.issues = 0
        #: Choices that have not ended.
        self.open = set(range(submit.n))
        self.progress = [Progress() for _ in range(submit.n)]
        self._deltas: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[ChoiceDelta]:
        while self.open or not self._deltas.empty():
            item = await self._deltas.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def end_choice(self, index: int) -> None:
        if index in self.open:
            self.engine.abort(self, index)
            self._choice_ended(index)

    def close(self) -> None:
        if not self._closed and self.open:
            self.engine.abort(self, None)
            for index in list(self.open):
                self._choice_ended(index)
        self._closed = True

    def put(self, delta: ChoiceDelta) -> None:
        """Tokens have come."""
        if delta.index not in self.open:
            return
        if self.submit.stream:
            so_far = self.progress[delta.index]
            so_far.token_ids += delta.token_ids
            so_far.logprobs += delta.logprobs
            so_far.versions = [*so_far.versions, *delta.versions]
        self._deltas.put_nowait(delta)
        if delta.finish_reason is not None:
            self._choice_ended(delta.index)

    def fail(self, error: Exception) -> None:
        """It cannot be finished."""
        self.open.clear()
        self._deltas.put_nowait(error)
        self.engine.forget(self)

    def _choice_ended(self, index: int) -> None:
        self.open.discard(index)
        self.progress[index].ended = True
        if self.replica is not None:
            self.replica.sequences -= 1
        if not self.open:
            self.engine.forget(self)


class TorchEngine:
    """Hugging Face causal language models on replicas of their own; see ``Engine`` for the methods.

    Requests wait here, not in the replicas, until one has room: so the last to be free gets the next. A replica that
    dies is started anew, with the weights in use, and its requests are issued again.
    """

    def __init__(self, plan: EnginePlan, *, seed: int, key: str) -> None:
        """seed: for requests that bring none. key: under which a trainer on another host serves its weights."""
        self._plan, self._info, self._seed, self._key = plan, plan.info, seed, key
        self.replicas = [Replica(spec) for spec in plan.replicas]
        self._context = replica_context()
        self._waiting: deque[TorchGeneration] = deque()
        self._requests: dict[int, TorchGeneration] = {}
        self._numbers = itertools.count(1)
        self._homes: dict[int, int] = {}
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._weights: HostWeights | None = None
        #: Stages, commits and the start of replicas change which buffer holds what: one at a time.
        self._changing = asyncio.Lock()
        self._restarts = self._prompt_tokens = self._finished = 0
        self._failure: str | None = None
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        starts = [asyncio.create_task(self._start(replica)) for replica in self.replicas]
        try:
            hellos = await asyncio.gather(*starts)
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        self._info.vocab_size = hellos[0].vocab_size
        self._weights = HostWeights(hellos[0].tensors, self._plan.dtype, self._info.model_fingerprint)
        for replica in self.replicas:
            self._serve(replica)

    async def _start(self, replica: Replica) -> Hello:
        """Start a replica's process and wait until its model is loaded. Raises UserError, Unavailable."""
        replica.process = ReplicaProcess(replica.spec, self._context, self._on_message, self._on_death)
        await replica.process.start()
        answer = await self._answer(replica, LOAD_DEADLINE, f"{replica.spec.name} to load the model")
        assert isinstance(answer, Hello)
        return answer

    async def close(self) -> None:
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(r.process.stop() for r in self.replicas if r.process is not None))
        self._stager.shutdown(wait=False, cancel_futures=True)
        if self._weights is not None:
            self._weights.close()

    async def drain(self, timeout: float) -> None:
        await self._until_empty(timeout)
        for generation in list(self._requests.values()):
            if generation.replica is not None:
                self._send(generation.replica, Abort(request=generation.submit.request, silent=False))
            else:
                for index in list(generation.open):
                    generation.put(ChoiceDelta(index=index, finish_reason="abort"))
        # An abort takes one step at the most; the answers then still have to be written.
        await self._until_empty(5.0)

    async def _until_empty(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._requests and not self._failure and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # ---- what it is --------------------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        self._info.version, self._info.run_id = self.status().version, self.status().run_id
        return self._info

    def status(self) -> WeightStatus:
        return self._weights.status if self._weights is not None else WeightStatus(version=0, run_id="", state="idle")

    def failure(self) -> str | None:
        return self._failure

    def load(self) -> EngineLoad:
        loads = [replica.load for replica in self.replicas]
        ended = [replica.before for replica in self.replicas]

        def total(name: str) -> int:
            return sum(getattr(load, name) for load in [*loads, *ended])

        return EngineLoad(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads) + sum(len(g.open) for g in self._waiting),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=total("generated_tokens"),
            finished=self._finished,
            steps=total("steps"),
            cache_usage=sum(load.cache_usage for load in loads) / len(loads),
            prefix_queries=total("prefix_queries"),
            prefix_hits=total("prefix_hits"),
            preemptions=total("preemptions"),
            restarts=self._restarts,
            idle_seconds=sum(load.idle_seconds for load in [*loads, *ended]) / len(loads),
        )

    # ---- requests ----------------------------------------------------------------------------------------------

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        limit, vocabulary = self._info.max_model_len, self._info.vocab_size
        if not prompt:
            raise InvalidRequest("prompt: it is empty; it needs at least one token", "prompt")
        if len(prompt) + sampling.max_tokens > limit:
            raise InvalidRequest(
                f"prompt of {len(prompt)} tokens + max_tokens {sampling.max_tokens} = "
                f"{len(prompt) + sampling.max_tokens} exceed this server's limit of {limit} (--max_model_len)",
                "max_tokens",
            )
        if sampling.min_tokens > sampling.max_tokens:
            raise InvalidRequest(
                f"min_tokens: must be between 0 and max_tokens, {sampling.max_tokens}; got {sampling.min_tokens}",
                "min_tokens",
            )
        biased = [token for token, _ in sampling.logit_bias]
        for field, ids in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids), ("logit_bias", biased)):
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= vocabulary:
                raise InvalidRequest(
                    f"{field}: token id {low if low < 0 else high} is outside the vocabulary, 0 to {vocabulary - 1}",
                    field,
                )
        allowed = MAX_STOP_TOKENS - len(self.replicas[0].spec.stop_tokens)
        if len(sampling.stop_token_ids) > allowed:
            raise InvalidRequest(
                f"stop_token_ids: {len(sampling.stop_token_ids)} given, at most {allowed} are possible",
                "stop_token_ids",
            )

    def generate(
        self, prompt: list[int], sampling: SamplingParams, n: int, request_id: str, stream: bool
    ) -> TorchGeneration:
        self.check(prompt, sampling)
        if self._failure:
            raise Unavailable(self._failure)
        number = next(self._numbers)
        seed = sampling.seed if sampling.seed is not None else (self._seed * 1_000_003 + number) % 2**63
        generation = TorchGeneration(
            self,
            Submit(request=number, prompt=pack_ints(prompt), sampling=sampling, n=n, seed=seed, stream=stream),
        )
        self._requests[number] = generation
        self._prompt_tokens += len(prompt)
        self._waiting.append(generation)
        self._dispatch()
        return generation

    def abort(self, generation: TorchGeneration, index: int | None) -> None:
        """Stop a request, or one choice of it, wherever it is."""
        if generation.replica is not None:
            self._send(generation.replica, Abort(request=generation.submit.request, index=index))

    def forget(self, generation: TorchGeneration) -> None:
        """A request has ended, in whatever way."""
        if self._requests.pop(generation.submit.request, None) is None:
            return
        self._finished += 1
        if generation.replica is not None:
            generation.replica.requests.pop(generation.submit.request, None)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand waiting requests to replicas with room, first come, first served."""
        while self._waiting:
            generation = self._waiting[0]
            ready = [replica for replica in self.replicas if replica.ready and not replica.full]
            if not ready:
                return
            self._waiting.popleft()
            home = self._homes.get(generation.key)
            replica = choose_replica(ready, self.replicas[home] if home is not None else None)
            if len(self._homes) > 10_000:  # only a memory of where prefixes are warm
                self._homes.clear()
            self._homes[generation.key] = self.replicas.index(replica)
            self._issue(generation, replica)

    def _issue(self, generation: TorchGeneration, replica: Replica) -> None:
        submit = generation.submit
        submit.progress = generation.progress if generation.issues else []
        generation.replica = replica
        generation.issues += 1
        replica.requests[submit.request] = generation
        replica.sequences += len(generation.open)
        replica.unreported_tokens += len(unpack_ints(submit.prompt)) * len(generation.open)
        self._send(replica, submit)

    # ---- weights -----------------------------------------------------------------------------------------------

    async def stage(self, manifest: Manifest) -> WeightStatus:
        async with self._changing:
            weights = self._ready_weights()
            loop = asyncio.get_running_loop()
            order = await loop.run_in_executor(self._stager, weights.stage, manifest, self._key)
            replicas = [replica for replica in self.replicas if replica.ready]
            answers = await asyncio.gather(
                *(self._ask(replica, order, STAGE_DEADLINE, "to copy a version") for replica in replicas),
                return_exceptions=True,
            )
            for replica, answer in zip(replicas, answers, strict=True):
                if isinstance(answer, Staged) and answer.error is None:
                    continue
                if not replica.ready:
                    continue  # it died, and is being started anew with the version in use
                reason = answer.error if isinstance(answer, Staged) else str(answer)
                raise Conflict(weights.refuse(manifest, Conflict(f"{replica.spec.name}: {reason}")))
            return weights.staged(manifest)

    async def commit(self, run_id: str, version: int, inflight: Inflight) -> WeightStatus:
        async with self._changing:
            weights = self._ready_weights()
            weights.check_commit(run_id, version)
            replicas = [replica for replica in self.replicas if replica.ready]
            # With "wait" a commit takes as long as the longest rollout; what ends the wait otherwise is a death.
            answers = await asyncio.gather(
                *(self._ask(r, Commit(version=version, inflight=inflight), None, "to commit") for r in replicas),
                return_exceptions=True,
            )
            done = [answer for answer in answers if isinstance(answer, Committed)]
            if not done:
                raise Unavailable("every replica died during the commit; they are being started anew")
            return weights.committed(run_id, version, max(answer.seconds for answer in done))

    def _ready_weights(self) -> HostWeights:
        if self._failure:
            raise Unavailable(self._failure)
        if self._weights is None or not any(replica.ready for replica in self.replicas):
            raise Unavailable("no replica is ready; they are being started")
        return self._weights

    # ---- replicas ----------------------------------------------------------------------------------------------

    def _send(self, replica: Replica, message: Submit | Abort) -> None:
        if replica.process is not None:
            replica.process.send(message)

    async def _ask(self, replica: Replica, message: object, deadline: float | None, what: str) -> FromReplica:
        assert replica.process is not None
        replica.process.send(message)  # type: ignore[arg-type]
        return await self._answer(replica, deadline, f"{replica.spec.name} {what}")

    async def _answer(self, replica: Replica, deadline: float | None, what: str) -> FromReplica:
        """What a replica says to an order. Raises Unavailable when it dies or does not answer in time."""
        replica.answer = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(replica.answer, deadline)
        except TimeoutError as error:
            raise Unavailable(f"waited {deadline:g} s for {what} in vain") from error
        finally:
            replica.answer = None

    def _replica_of(self, process: ReplicaProcess) -> Replica | None:
        return next((replica for replica in self.replicas if replica.process is process), None)

    def _on_message(self, process: ReplicaProcess, message: FromReplica) -> None:
        replica = self._replica_of(process)
        if replica is None:
            return
        match message:
            case Step(updates=updates, load=load):
                process.load = load
                replica.unreported_tokens = 0
                for update in updates:
                    self._on_update(update)
                self._dispatch()
            case Crashed(message=text, user_error=mendable):
                log.error("%s crashed: %s", replica.spec.name, text)
                if replica.answer is not None and not replica.answer.done():
                    replica.answer.set_exception(UserError(text) if mendable else Unavailable(text.splitlines()[0]))
            case _:
                if replica.answer is not None and not replica.answer.done():
                    replica.answer.set_result(message)

    def _on_update(self, update: Update) -> None:
        generation = self._requests.get(update.request)
        if generation is None:
            return
        if update.failure is not None:
            generation.fail(Unavailable(update.failure))
        elif update.delta is not None:
            generation.put(update.delta)

    def _on_death(self, process: ReplicaProcess, code: int | None) -> None:
        replica = self._replica_of(process)
        if replica is None or self._closing:
            return
        was_ready = replica.ready
        replica.before = _sum(replica.before, process.load)
        replica.ready, replica.process = False, None
        replica.sequences = replica.unreported_tokens = 0
        if replica.answer is not None and not replica.answer.done():
            replica.answer.set_exception(Unavailable(f"{replica.spec.name} died with exit code {code}"))
        orphans = list(replica.requests.values())
        replica.requests.clear()
        log.error("%s died with exit code %s; %d requests are issued again", replica.spec.name, code, len(orphans))
        for generation in reversed(orphans):
            generation.replica = None
            if generation.issues >= MAX_ISSUES:
                generation.fail(Unavailable(f"the replica that served it died {generation.issues} times"))
            else:
                self._waiting.appendleft(generation)
        if was_ready:
            self._count_death(replica, f"exit code {code}")
            self._spawn_restart(replica)
        self._dispatch()

    def _serve(self, replica: Replica) -> None:
        """It holds the weights in use and takes requests from now on."""
        replica.ready, replica.ready_since = True, time.monotonic()
        self._dispatch()

    def _count_death(self, replica: Replica, reason: str) -> None:
        """Give up when one replica does nothing but die."""
        if time.monotonic() - replica.ready_since > SERVED:
            replica.deaths = 0
        replica.ready_since = math.inf
        replica.deaths += 1
        if replica.deaths >= MAX_DEATHS:
            self._fail(f"the engine stopped: {replica.spec.name} died {replica.deaths} times in a row, last: {reason}")

    def _spawn_restart(self, replica: Replica) -> None:
        task = asyncio.get_running_loop().create_task(self._restart(replica))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self, replica: Replica) -> None:
        """Start a replica anew, with the weights in use."""
        self._restarts += 1
        while not self._closing and not self._failure:
            try:
                await self._start(replica)
                async with self._changing:
                    assert self._weights is not None
                    order = self._weights.live()
                    if order is not None:
                        staged = await self._ask(replica, order, STAGE_DEADLINE, "to copy the version in use")
                        assert isinstance(staged, Staged)
                        if staged.error is not None:
                            raise Unavailable(staged.error)
                        version = self._weights.status.version
                        await self._ask(replica, Commit(version=version, inflight="keep"), STAGE_DEADLINE, "to commit")
                    # What is staged but not committed yet, it does not hold.
                    if self._weights.status.state == "staged":
                        self._weights.status.state, self._weights.status.staged_version = "idle", None
                log.info("%s is back", replica.spec.name)
                self._serve(replica)
                return
            except (Unavailable, UserError) as error:
                log.error("%s cannot be started: %s", replica.spec.name, error)
                if replica.process is not None:
                    await replica.process.stop()
                    replica.process = None
                self._count_death(replica, str(error))
                await asyncio.sleep(1.0)

    def _fail(self, reason: str) -> None:
        """The engine works no more: everybody who waits is told why."""
        self._failure = reason
        log.error("%s", reason)
        for generation in list(self._requests.values()):
            generation.fail(Unavailable(reason))


def _sum(a: Load, b: Load) -> Load:
    """Counters of two loads together; what is running now counts no more."""
    names = ("generated_tokens", "steps", "prefix_queries", "prefix_hits", "preemptions")
    return Load(
        **{name: getattr(a, name) + getattr(b, name) for name in names}, idle_seconds=a.idle_seconds + b.idle_seconds
    )
