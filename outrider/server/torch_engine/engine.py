"""The embedded engine, seen from the HTTP application: replicas, and who gets which request."""

import asyncio
import itertools
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from outrider.contract.arrays import pack_ints, unpack_ints
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.manifest import Manifest
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import Conflict, EngineLoad, Unavailable
from outrider.server.limits import MAX_STOP_TOKENS, check_request
from outrider.server.torch_engine.dispatch import choose_replica
from outrider.server.torch_engine.fleet import Fleet, Replica
from outrider.server.torch_engine.generation import TorchGeneration
from outrider.server.torch_engine.host_weights import HostWeights
from outrider.server.torch_engine.loading import EnginePlan
from outrider.server.torch_engine.messages import (
    Abort,
    Commit,
    Committed,
    Staged,
    Submit,
    Update,
)

log = logging.getLogger(__name__)

#: Seconds for a replica to copy a staged version, and to commit it with nothing to wait for.
STAGE_DEADLINE = 600.0
#: How often one request may be issued.
MAX_ISSUES = 4


class TorchEngine:
    """Hugging Face causal language models on replicas of their own; see ``Engine`` for the methods.

    Requests wait here, not in the replicas, until one has room: so the last to be free gets the next. A replica that
    dies is started anew, with the weights in use, and its requests are issued again.
    """

    def __init__(self, plan: EnginePlan, *, seed: int, key: str) -> None:
        """seed: for requests that bring none. key: under which a trainer on another host serves its weights."""
        self._plan, self._info, self._seed, self._key = plan, plan.info, seed, key
        self.fleet = Fleet(
            plan.replicas,
            on_update=self._on_update,
            on_room=self._dispatch,
            on_orphans=self._on_orphans,
            on_failure=self._on_failure,
            equip=self._equip,
        )
        self._waiting: deque[TorchGeneration] = deque()
        self._requests: dict[int, TorchGeneration] = {}
        self._numbers = itertools.count(1)
        self._homes: dict[int, int] = {}
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._weights: HostWeights | None = None
        #: Stages, commits and the start of replicas change which buffer holds what: one at a time.
        self._changing = asyncio.Lock()
        self._prompt_tokens = self._finished = 0
        self._failure: str | None = None
        self._cutting_off = False

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        hellos = await self.fleet.start()
        self._info.vocab_size = hellos[0].vocab_size
        self._weights = HostWeights(hellos[0].tensors, self._plan.dtype, self._info.model_fingerprint)
        self.fleet.serve()

    async def close(self) -> None:
        await self.fleet.close()
        self._stager.shutdown(wait=False, cancel_futures=True)
        if self._weights is not None:
            self._weights.close()

    async def drain(self, timeout: float) -> None:
        await self._until_empty(timeout)
        self._cutting_off = True
        for generation in list(self._requests.values()):
            if generation.replica is not None:
                generation.replica.send(Abort(request=generation.submit.request, silent=False))
            else:
                generation.cut_off()
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
        loads = [replica.load for replica in self.fleet.replicas]
        ended = [replica.before for replica in self.fleet.replicas]

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
            restarts=self.fleet.restarts,
            idle_seconds=sum(load.idle_seconds for load in [*loads, *ended]) / len(loads),
        )

    # ---- requests ----------------------------------------------------------------------------------------------

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        check_request(prompt, sampling, self._info, MAX_STOP_TOKENS - len(self._plan.replicas[0].stop_tokens))

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
            generation.replica.send(Abort(request=generation.submit.request, index=index))

    def forget(self, generation: TorchGeneration) -> None:
        """A request has ended, in whatever way."""
        if self._requests.pop(generation.submit.request, None) is None:
            return
        self._finished += 1
        if generation.replica is not None:
            generation.replica.requests.discard(generation.submit.request)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand waiting requests to replicas with room, first come, first served."""
        while self._waiting:
            generation = self._waiting[0]
            ready = [replica for replica in self.fleet.ready if not replica.full]
            if not ready:
                return
            self._waiting.popleft()
            home = self._homes.get(generation.key)
            replica = choose_replica(ready, self.fleet.replicas[home] if home is not None else None)
            if len(self._homes) > 10_000:  # only a memory of where prefixes are warm
                self._homes.clear()
            self._homes[generation.key] = self.fleet.replicas.index(replica)
            self._issue(generation, replica)

    def _issue(self, generation: TorchGeneration, replica: Replica) -> None:
        submit = generation.submit
        submit.progress = generation.progress if generation.issues else []
        generation.replica = replica
        generation.issues += 1
        replica.requests.add(submit.request)
        replica.sequences += len(generation.open)
        replica.unreported_tokens += len(unpack_ints(submit.prompt)) * len(generation.open)
        replica.send(submit)

    # ---- weights -----------------------------------------------------------------------------------------------

    async def stage(self, manifest: Manifest) -> WeightStatus:
        async with self._changing:
            weights = self._ready_weights()
            loop = asyncio.get_running_loop()
            order = await loop.run_in_executor(self._stager, weights.stage, manifest, self._key)
            replicas = self.fleet.ready
            answers = await asyncio.gather(
                *(replica.ask(order, STAGE_DEADLINE, "to copy a version") for replica in replicas),
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
            replicas = self.fleet.ready
            # With "wait" a commit takes as long as the longest rollout; what ends the wait otherwise is a death.
            answers = await asyncio.gather(
                *(r.ask(Commit(version=version, inflight=inflight), None, "to commit") for r in replicas),
                return_exceptions=True,
            )
            done = [answer for answer in answers if isinstance(answer, Committed)]
            if not done:
                raise Unavailable("every replica died during the commit; they are being started anew")
            return weights.committed(run_id, version, max(answer.seconds for answer in done))

    def _ready_weights(self) -> HostWeights:
        if self._failure:
            raise Unavailable(self._failure)
        if self._weights is None or not self.fleet.ready:
            raise Unavailable("no replica is ready; they are being started")
        return self._weights

    # ---- replicas ----------------------------------------------------------------------------------------------

    def _on_update(self, update: Update) -> None:
        generation = self._requests.get(update.request)
        if generation is None:
            return
        if update.failure is not None:
            generation.fail(Unavailable(update.failure))
        elif update.delta is not None:
            generation.put(update.delta)

    def _on_orphans(self, requests: set[int]) -> None:
        """A replica has died: its requests go first when there is room, unless they seem to be what kills replicas."""
        for number in sorted(requests, reverse=True):
            generation = self._requests[number]
            generation.replica = None
            if self._cutting_off:
                generation.cut_off()
            elif generation.issues >= MAX_ISSUES:
                generation.fail(Unavailable(f"the replica that served it died {generation.issues} times"))
            else:
                self._waiting.appendleft(generation)

    async def _equip(self, replica: Replica) -> None:
        """Bring a new process to the weights in use."""
        async with self._changing:
            assert self._weights is not None
            order = self._weights.live()
            if order is not None:
                staged = await replica.ask(order, STAGE_DEADLINE, "to copy the version in use")
                assert isinstance(staged, Staged)
                if staged.error is not None:
                    raise Unavailable(staged.error)
                version = self._weights.status.version
                await replica.ask(Commit(version=version, inflight="keep"), STAGE_DEADLINE, "to commit")
            # What is staged but not committed yet, it does not hold.
            self._weights.unstage()

    def _on_failure(self, reason: str) -> None:
        """The engine works no more: everybody who waits is told why."""
        self._failure = reason
        log.error("%s", reason)
        for generation in list(self._requests.values()):
            generation.fail(Unavailable(reason))
