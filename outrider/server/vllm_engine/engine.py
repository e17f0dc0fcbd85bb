"""vLLM, seen from the HTTP application: requests and weights, through the client of vLLM's own server process."""

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

import xxhash
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.errors import UserError
from outrider.contract.generation import FinishReason
from outrider.contract.manifest import Manifest
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import Conflict, EngineLoad, InvalidRequest, Unavailable
from outrider.server.limits import MAX_STOP_TOKENS, check_request
from outrider.server.vllm_engine.differences import VllmVersionError, needed
from outrider.server.vllm_engine.generation import Choice, VllmGeneration
from outrider.server.vllm_engine.hot import LIMIT
from outrider.server.vllm_engine.sampling import tokens_of, vllm_params
from outrider.server.vllm_engine.settings import VllmSettings
from outrider.server.vllm_engine.stats import VllmCounters
from outrider.server.vllm_engine.tokens import Tokens
from outrider.server.vllm_engine.weights import VllmWeights
from outrider.server.vllm_engine.workers import Workers, tokens_sampled

log = logging.getLogger(__name__)

#: How often requests are run at the start to hear from workers how far they are, and how long these are: long enough
#: to be still there when workers are asked, which comes a few steps later.
WARM_UPS, WARM_UP_TOKENS = 10, 512
#: No step of vLLM takes less, whatever the model: its own Python takes longer, seconds.
SHORTEST_STEP = 3e-4


class VllmEngine:
    """Every data-parallel engine of one vLLM server; see ``Engine`` for the methods.

    Requests wait here until an engine has room. What vLLM does not know is which weights sampled which token: a commit
    brings back from the workers how far each request had got, and what comes before it is settled is held back until
    then. A request that had no token yet is begun anew, so that no keys and values of its prompt are older than its
    first token; so prefixes are shared within a version only, whose name salts their hashes.
    """

    def __init__(
        self,
        client: Any,
        settings: VllmSettings,
        info: ServerInfo,
        stops: frozenset[int],
        weights: VllmWeights,
    ) -> None:
        """client: vLLM's ``EngineClient``. stops: the model's end-of-text tokens."""
        self._client, self._settings, self._info, self._stops = client, settings, info, stops
        self._workers = Workers(client, settings)
        self._weights = weights
        self._counters = VllmCounters()
        self._numbers = itertools.count(1)
        self._generations: set[VllmGeneration] = set()
        #: Names the weights in use: a version may come twice, in another run or after a roll-back.
        self._commits = 0
        self._aborting: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[Choice, asyncio.Future[bool]]] = deque()
        self._admitted: set[Choice] = set()
        #: Sequences on each engine, and the engine on which a prompt was seen last.
        self._loads: Counter[int] = Counter()
        self._homes: dict[int, int] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._closed = False  # to new sequences, for a commit that waits for the running ones
        self._cutting_off = False
        self._changing = asyncio.Lock()
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._prompt_tokens = self._finished = self._generated = 0
        self._idle_since: float | None = time.monotonic()
        self._idle_seconds = 0.0
        self._failure: str | None = None

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        with needed():
            dtype: Any = self._info.torch_dtype
            await self._workers.prepare(self._settings.staging, dtype, self._weights.shapes)
            await self._warm_up()

    async def _warm_up(self) -> None:
        """A request to every engine: what it cannot do it says now, and nobody waits for what is made on first use. And
        while they run, workers say how far they have got, as at a commit: whether they can is known then. Raises
        UserError."""
        length = min(WARM_UP_TOKENS, self._info.max_model_len - 1)
        try:
            for attempt in range(WARM_UPS):
                expected, found = await self._run_and_ask(length, attempt)
                if expected <= found:
                    return
        except Unavailable as error:
            raise UserError(f"--model {self._info.model}: it cannot be run: {error}") from error
        if length > WARM_UP_TOKENS // 4:  # shorter ones may always have ended before they were asked for
            raise VllmVersionError(f"its workers are to know requests {sorted(expected)}, they know {sorted(found)}")

    async def _run_and_ask(self, length: int, attempt: int) -> tuple[set[str], Set[str]]:
        """The ids of requests that run on every engine, and those that workers give."""
        sampling = SamplingParams(max_tokens=length, ignore_eos=True, seed=0)
        names = range(self._settings.engines)
        choices = [Choice([0], sampling, index, f"outrider-warm-{attempt}", 0) for index in names]
        async with AsyncExitStack() as running:

            async def begin(choice: Choice) -> None:
                choice.engine = choice.index
                stream = await running.enter_async_context(aclosing(self.stream(choice, True)))
                given = 0
                async for tokens, _ in stream:
                    given += len(tokens.ids)
                    if given >= 2:  # it has been prefilled and decoded
                        break

            begun = await asyncio.gather(*map(begin, choices), return_exceptions=True)
            for failure in filter(None, begun):
                raise failure
            progress = await self._workers.progress()
        return {choice.request_id for choice in choices}, progress.keys()

    async def close(self) -> None:
        self._stager.shutdown(wait=False, cancel_futures=True)
        self._weights.close()

    async def drain(self, timeout: float) -> None:
        await self._until_empty(timeout)
        self._cutting_off = True
        while self._waiting:
            place = self._waiting.popleft()[1]
            if not place.done():
                place.set_result(False)
        ends = (self._client.abort(choice.request_id) for choice in list(self._admitted))
        await asyncio.gather(*ends, return_exceptions=True)
        await self._until_empty(5.0)

    async def _until_empty(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._generations and not self.failure() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # ---- what it is --------------------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        self._info.version, self._info.run_id = self.status().version, self.status().run_id
        return self._info

    def status(self) -> WeightStatus:
        return self._weights.status

    def failure(self) -> str | None:
        if self._failure is None and self._client.errored:
            self._failure = "vLLM's engine has stopped; its log says why"
        return self._failure

    def load(self) -> EngineLoad:
        counters = self._counters.read()

        def count(name: str, otherwise: int = 0) -> int:
            return int(counters.get(f"vllm:{name}", otherwise))

        idle = 0.0 if self._idle_since is None else time.monotonic() - self._idle_since
        return EngineLoad(
            running=len(self._admitted),
            waiting=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=count("generation_tokens", self._generated),
            finished=self._finished,
            steps=count("iteration_tokens_total_count"),
            cache_usage=counters.get("vllm:kv_cache_usage_perc", 0) / self._settings.engines,
            prefix_queries=count("prefix_cache_queries"),
            prefix_hits=count("prefix_cache_hits"),
            preemptions=count("num_preemptions"),
            idle_seconds=self._idle_seconds + idle,
        )

    # ---- requests ----------------------------------------------------------------------------------------------

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        check_request(prompt, sampling, self._info, MAX_STOP_TOKENS - len(self._stops))
        if sampling.temperature > LIMIT and not self._settings.hot:
            raise InvalidRequest(
                f"temperature: must be a number between 0 and {LIMIT:g} on this server, got {sampling.temperature:g}",
                "temperature",
            )

    def generate(
        self, prompt: list[int], sampling: SamplingParams, n: int, request_id: str, stream: bool
    ) -> VllmGeneration:
        self.check(prompt, sampling)
        if failure := self.failure():
            raise Unavailable(failure)
        name = f"outrider-{next(self._numbers)}"
        choices = [Choice(prompt, sampling, index, name, _seed_of(sampling.seed, index)) for index in range(n)]
        generation = VllmGeneration(self, choices, stream)
        self._generations.add(generation)
        self._prompt_tokens += len(prompt)
        return generation

    def forget(self, generation: VllmGeneration) -> None:
        """A request has ended, in whatever way."""
        self._generations.discard(generation)
        self._finished += 1

    async def admit(self, choice: Choice) -> bool:
        """Wait for a place; False when the choice is cut off before it has got one."""
        if self._cutting_off:
            return False
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((choice, place))
        self._dispatch()
        try:
            return await place
        except asyncio.CancelledError:
            self._waiting = deque(item for item in self._waiting if item[1] is not place)
            raise

    def leave(self, choice: Choice) -> None:
        """The choice needs its place no more."""
        if choice in self._admitted:
            self._admitted.discard(choice)
            self._loads[choice.engine] -= 1
            if not self._admitted:
                self._idle_since = time.monotonic()
            self._dispatch()

    def _dispatch(self) -> None:
        """Give places to those who wait, first come, first served."""
        while self._waiting and not self._closed:
            engines = range(self._settings.engines)
            least = min(engines, key=lambda engine: self._loads[engine])
            if self._loads[least] >= self._settings.engine_seqs:
                return
            choice, place = self._waiting.popleft()
            if place.done():
                continue
            choice.engine = self._home(choice, least)
            self._loads[choice.engine] += 1
            self._admitted.add(choice)
            if self._idle_since is not None:
                self._idle_seconds += time.monotonic() - self._idle_since
                self._idle_since = None
            place.set_result(True)

    def _home(self, choice: Choice, least: int) -> int:
        """The engine that has seen the prompt, unless it is full or has clearly more to do than ``least``."""
        if self._settings.engines == 1:
            return 0
        key = xxhash.xxh3_64_intdigest(repr(choice.prompt).encode())
        home = self._homes.get(key, least)
        if self._loads[home] >= self._settings.engine_seqs or self._loads[home] > 1.25 * self._loads[least] + 8:
            home = least
        if len(self._homes) > 10_000:  # only a memory of where prefixes are warm
            self._homes.clear()
        self._homes[key] = home
        return home

    async def settled(self) -> None:
        """Wait while a commit decides what becomes of requests in flight."""
        if not self._settled.is_set():
            await self._settled.wait()

    async def stream(self, choice: Choice, by_token: bool) -> AsyncGenerator[tuple[Tokens, FinishReason | None], None]:
        """Submit the choice to vLLM, and give its tokens as they come. Raises Unavailable."""
        await self.settled()
        choice.submitted(self.status().version)
        request_id = choice.request_id  # of this request: the choice may be at its next one when it is ended here
        seed = choice.seed
        if seed is not None and choice.attempt:
            # What was drawn for the first tokens must not be drawn for later ones again.
            seed = (seed + 1_000_003 * (choice.attempt + len(choice.done))) % 2**63
        stops = self._stops
        kept = len(choice.done)
        params = vllm_params(choice.sampling, seed=seed, stops=stops, kept=kept, stream=by_token)
        prompt = tokens_input(choice.prompt + choice.done, cache_salt=f"commit {self._commits}")
        rank = choice.engine if self._settings.engines > 1 else None
        alternatives, ended = choice.sampling.alternatives, False
        try:
            outputs = self._client.generate(prompt, params, request_id, data_parallel_rank=rank)
            async for output in outputs:
                [completion] = output.outputs
                tokens = tokens_of(completion, alternatives)
                self._generated += len(tokens.ids)
                ended, reason = output.finished, completion.finish_reason if output.finished else None
                if reason not in (None, "stop", "length", "abort"):
                    raise Unavailable(f"vLLM ended the request with {reason!r}")
                yield tokens, cast(FinishReason | None, reason)
        except (EngineDeadError, EngineGenerateError) as error:
            raise Unavailable(f"vLLM's engine has stopped ({type(error).__name__}); its log says why") from error
        finally:
            # vLLM forgets to end a request whose caller is cancelled while it is being submitted.
            if not ended and not self._client.errored:
                aborting = asyncio.create_task(self._client.abort(request_id))
                self._aborting.add(aborting)
                aborting.add_done_callback(self._aborting.discard)

    # ---- weights -----------------------------------------------------------------------------------------------

    async def stage(self, manifest: Manifest) -> WeightStatus:
        async with self._changing:
            weights, loop, number = self._weights, asyncio.get_running_loop(), self._workers.next_order()
            self._check_alive()
            weights.begin()
            path = await loop.run_in_executor(self._stager, weights.order, manifest, number, self._workers.directory)
            try:
                reports = await self._workers.stage(path, number)
            except Exception as error:
                raise Conflict(weights.refuse(manifest, error)) from error
            for report in reports:
                if report.error is not None:
                    reason = Conflict(f"engine {report.engine}, rank {report.rank}: {report.error}")
                    raise Conflict(weights.refuse(manifest, reason))
            copied = time.monotonic()
            await loop.run_in_executor(self._stager, weights.verify, manifest)
            log.info(
                "version %d staged: %s in %.2f s by the slowest worker, verified in %.2f s",
                manifest.version,
                "copied" if all(report.known_copies for report in reports) else "loaded by vLLM",
                max(report.seconds for report in reports),
                time.monotonic() - copied,
            )
            return weights.staged(manifest)

    async def commit(self, run_id: str, version: int, inflight: Inflight) -> WeightStatus:
        async with self._changing:
            self._weights.check_commit(run_id, version)
            self._check_alive()
            try:
                if inflight == "wait":
                    self._closed = True
                    while self._admitted and not self.failure():
                        await asyncio.sleep(0.005)
                self._settled.clear()
                number = self._workers.next_order()
                await self._switch(number, run_id, version, inflight)
            finally:
                self._closed = False
                self._settled.set()
                self._dispatch()
            # Nobody waits for this any more but whoever has asked.
            return self._weights.committed(run_id, version, await self._workers.seconds_of_switch(number))

    async def _switch(self, number: int, run_id: str, version: int, inflight: Inflight) -> None:
        """Have all workers switch, and settle what that means for the requests in flight."""
        try:
            reports = await self._workers.commit(number, version)
        except Exception as error:  # whatever it is: who has switched is not known
            raise self._broken(f"version {version}: {error}") from error
        for report in reports:
            if report.error is not None:
                raise self._broken(f"version {version}: engine {report.engine}, rank {report.rank}: {report.error}")
        self._weights.committed(run_id, version, self.status().commit_seconds)
        self._commits = number
        progress = tokens_sampled(reports)
        if any(report.cleared for report in reports):
            inflight, progress = "recompute", {}
        steps = (time.monotonic() - min(report.began for report in reports)) / SHORTEST_STEP
        for choice in self._admitted:
            self._settle(choice, progress.get(choice.request_id, 0), version, inflight, steps)
        anew = [choice.request_id for choice in self._admitted if choice.restart is not None]
        if anew:
            if inflight != "recompute":
                log.info("version %d: %d sequences that no engine ran when it came are begun anew", version, len(anew))
            await self._client.abort(anew)

    def _settle(self, choice: Choice, sampled: int, version: int, inflight: Inflight, steps: float) -> None:
        """What a commit of ``version`` means for a choice that had ``sampled`` tokens then; 0 stands for none, and
        for requests that were not being run: put back, or ended. steps: more steps than can have been made since."""
        if choice.restart is not None:
            return
        if sampled:
            choice.marks.append((sampled, version))
            if inflight == "recompute" and choice.divisible:
                choice.restart = sampled
        elif choice.ended and choice.given > steps:
            choice.marks.append((choice.given, version))  # it had ended before the commit
        else:
            choice.restart = 0  # what has been handed on stays in any case: that was before the commit

    def _broken(self, reason: str) -> Unavailable:
        """Workers may hold different weights now: nothing may be sampled any more."""
        self._failure = f"the engines are not known to hold the same weights: commit of {reason}"
        log.error("%s", self._failure)
        for generation in list(self._generations):
            generation.fail(Unavailable(self._failure))
        return Unavailable(self._failure)

    def _check_alive(self) -> None:
        if failure := self.failure():
            raise Unavailable(failure)


def _seed_of(seed: int | None, index: int) -> int | None:
    """The seed of one choice: it depends on the request's and on the index alone."""
    if seed is None:
        return None
    return xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode()) % 2**63
