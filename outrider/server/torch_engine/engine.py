"""The embedded engine: continuous batching on a thread of its own, asked and answered from an event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.generation import CompletionChoice, FinishReason, SamplingParams
from outrider.contract.manifest import Manifest
from outrider.server.engine import EngineLoad, InvalidRequest, Unavailable
from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.model_runner import ModelRunner
from outrider.server.torch_engine.sampler import sample
from outrider.server.torch_engine.scheduler import Scheduler
from outrider.server.torch_engine.sequence import Request, Sequence
from outrider.server.torch_engine.slots import MAX_STOP_TOKENS, Slots
from outrider.server.torch_engine.weights import StagedWeights

log = logging.getLogger(__name__)

#: Something for the engine's thread to do between two steps.
Command = Callable[[], None]


class TorchEngine:
    """A Hugging Face causal language model, decoded for many requests at once (see ``Engine`` for the methods)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        info: ServerInfo,
        *,
        max_num_batched_tokens: int,
        stop_tokens: Iterable[int],
        seed: int,
        key: str,
    ) -> None:
        """info: identity and limits; version and run_id are kept up to date by the engine. stop_tokens: that end
        any completion. key: API key under which a trainer on another host serves its weights."""
        self._info, self.tokenizer, self._key = info, tokenizer, key
        self.slots = Slots(info.max_num_seqs, info.max_model_len)
        self.cache = SlotCache(
            model.config, info.max_num_seqs, info.max_model_len, next(model.parameters()).dtype, str(model.device)
        )
        self.scheduler = Scheduler(self.slots, self.cache, max_num_batched_tokens, sorted(set(stop_tokens)))
        self.runner = ModelRunner(model, self.cache, self.slots)
        self.weights = StagedWeights(model, info.model_fingerprint)
        self._seed, self._arrivals = seed, 0
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._stopping = False
        self._failure: str | None = None
        self._steps = self._prompt_tokens = self._generated_tokens = self._finished = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- called on the event loop ------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        self._info.version, self._info.run_id = self.weights.status.version, self.weights.status.run_id
        return self._info

    def status(self) -> WeightStatus:
        return self.weights.status

    def failure(self) -> str | None:
        return self._failure

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self.slots.used,
            waiting=self.scheduler.waiting_count,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            requests=self._finished,
            steps=self._steps,
            cache_usage=self.slots.used / self.slots.count,
        )

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    async def generate(
        self, prompt: list[int], sampling: SamplingParams, n: int, request_id: str
    ) -> list[CompletionChoice]:
        self._check(prompt, sampling)
        if self._failure:
            raise Unavailable(self._failure)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Request] = loop.create_future()

        def settle(request: Request) -> None:
            if not future.done():
                future.set_result(request)

        def on_done(request: Request) -> None:
            # The loop may be closed already when a drain ends the last requests.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, request)

        self._arrivals += 1
        seed = sampling.seed if sampling.seed is not None else self._seed * 1_000_003 + self._arrivals
        request = Request(request_id, prompt, sampling, n, seed, on_done)
        self._requests[id(request)] = request
        self._prompt_tokens += len(prompt)
        self._commands.put(lambda: self.scheduler.add(request))
        try:
            await future
        except asyncio.CancelledError:
            self._commands.put(lambda: self._abort(request))
            raise
        finally:
            self._requests.pop(id(request), None)
        self._finished += 1
        if request.failure:
            raise Unavailable(request.failure)
        if self._failure and any(choice is not None and choice.finish_reason == "abort" for choice in request.choices):
            raise Unavailable(self._failure)
        return [choice for choice in request.choices if choice is not None]

    async def stage(self, manifest: Manifest) -> WeightStatus:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._stager, self.weights.stage, manifest, self._key)

    async def commit(self, run_id: str, version: int) -> WeightStatus:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[WeightStatus] = loop.create_future()

        def settle(status: WeightStatus | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif status is not None:
                future.set_result(status)

        def between_steps() -> None:
            try:
                status = self.weights.commit(run_id, version)
            except Exception as error:  # noqa: BLE001 - handed to the awaiting route, whatever it is
                loop.call_soon_threadsafe(settle, None, error)
                return
            self._weights_changed(version)
            loop.call_soon_threadsafe(settle, status, None)

        if self._failure:
            raise Unavailable(self._failure)
        self._commands.put(between_steps)
        return await future

    async def drain(self, timeout: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        while self._requests and not self._failure and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for request in list(self._requests.values()):
            self._commands.put(lambda request=request: self._abort(request))  # type: ignore[misc]
        # An abort takes one step at the most; the answers then still have to be written.
        end = asyncio.get_running_loop().time() + 5.0
        while self._requests and not self._failure and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join(timeout=30.0)
        self._stager.shutdown(wait=False, cancel_futures=True)

    def _check(self, prompt: list[int], sampling: SamplingParams) -> None:
        limit = self._info.max_model_len
        if not prompt:
            raise InvalidRequest("prompt: it is empty; it needs at least one token", "prompt")
        if len(prompt) + sampling.max_tokens > limit:
            raise InvalidRequest(
                f"prompt of {len(prompt)} tokens + max_tokens {sampling.max_tokens} = "
                f"{len(prompt) + sampling.max_tokens} exceed this server's limit of {limit} (--max_model_len)",
                "max_tokens",
            )
        for field, ids in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids)):
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= self._info.vocab_size:
                raise InvalidRequest(
                    f"{field}: token id {low if low < 0 else high} is outside the vocabulary, "
                    f"0 to {self._info.vocab_size - 1}",
                    field,
                )
        allowed = MAX_STOP_TOKENS - len(self.scheduler.default_stops)
        if len(sampling.stop_token_ids) > allowed:
            raise InvalidRequest(
                f"stop_token_ids: {len(sampling.stop_token_ids)} given, at most {allowed} are possible",
                "stop_token_ids",
            )

    # ---- the engine's thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(wait=not self.scheduler.has_work)
                if self.scheduler.has_work:
                    self._step()
        except Exception as error:  # noqa: BLE001 - the thread's last resort: say why, and answer those who wait
            self._failure = f"the engine stopped: {type(error).__name__}: {error}"
            log.error("%s\n%s", self._failure, traceback.format_exc())
            for request in list(self._requests.values()):
                self._abort(request)

    def _run_commands(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            if wait:
                self._commands.get(timeout=1.0)()
            while True:
                self._commands.get_nowait()()

    def _step(self) -> None:
        plan = self.scheduler.plan()
        if plan.empty:
            return
        logits, rows = self.runner.forward(plan)
        ended = [sequence for sequence, _ in plan.chunks if sequence.prefilled]
        self.slots.start_decoding(len(ended))
        for sequence in ended:
            sequence.boundaries.append((self.weights.status.version, 0))
            self.scheduler.prefilled(sequence)
        self._steps += 1
        if len(rows) == 0:
            return
        tokens, logprobs = (drawn.cpu().numpy() for drawn in sample(logits, self.slots.sampling_rows(rows)))
        stopped, full = self.slots.append(rows, tokens, logprobs)
        self._generated_tokens += len(rows)
        # Whom first, then out: releasing a slot moves another sequence into it.
        by_stop = [self.slots.occupants[row] for row in rows[stopped]]
        by_length = [self.slots.occupants[row] for row in rows[full]]
        not_finite = [self.slots.occupants[row] for row in rows[~np.isfinite(logprobs)]]
        if not_finite:
            self._fail({sequence.request for sequence in not_finite})
        for sequence in by_stop:
            self._finish(sequence, "stop")
        for sequence in by_length:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out of its slot, if it has one, and hand over what it generated."""
        tokens: list[int] = []
        logprobs: list[float] = []
        if sequence.slot >= 0:
            slot = sequence.slot
            count = int(self.slots.generated[slot]) if sequence.prefilled else 0
            tokens = self.slots.out_tokens[slot, :count].tolist()
            logprobs = self.slots.out_logprobs[slot, :count].astype(np.float64).tolist()
            self.scheduler.forget(sequence)
            self.slots.release(slot, self.cache)
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        sequence.request.finish(sequence, tokens, logprobs, reason, text)

    def _abort(self, request: Request) -> None:
        self.scheduler.remove(request)
        for sequence in request.sequences:
            self._finish(sequence, "abort")

    def _fail(self, requests: set[Request]) -> None:
        """Give up requests whose probabilities are not finite, and keep what they left behind from the others."""
        for request in requests:
            request.failure = (
                f"weights of version {self.weights.status.version} give probabilities that are not finite "
                "(has the training diverged?)"
            )
            self._abort(request)
        self.cache.discard_non_finite()

    def _weights_changed(self, version: int) -> None:
        self.scheduler.weights_changed()
        for sequence in self.slots.occupants[: self.slots.decoding]:
            sequence.boundaries.append((version, int(self.slots.generated[sequence.slot])))
