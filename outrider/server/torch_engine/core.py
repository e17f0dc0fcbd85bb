"""Continuous batching over one model, step by step; knows nothing of processes or of the network."""

import time

import numpy as np
import torch
from transformers import PreTrainedModel

from outrider.contract.control import Inflight
from outrider.contract.generation import FinishReason
from outrider.server.engine import ChoiceDelta
from outrider.server.torch_engine import kernels
from outrider.server.torch_engine.cache import BLOCK, SlotCache, kv_shape
from outrider.server.torch_engine.live_weights import LiveWeights
from outrider.server.torch_engine.logits import adjust
from outrider.server.torch_engine.messages import Abort, Load, ReplicaSpec, Submit, Update
from outrider.server.torch_engine.model_runner import ModelRunner
from outrider.server.torch_engine.prefix import PrefixCache
from outrider.server.torch_engine.sampler import sample
from outrider.server.torch_engine.scheduler import Scheduler
from outrider.server.torch_engine.sequence import Request, Sequence
from outrider.server.torch_engine.slots import Slots


class EngineCore:
    """Takes requests, makes steps, and collects what there is to tell about them.

    Everything runs on one thread. Versions change between two steps, see :meth:`commit`.
    """

    def __init__(self, model: PreTrainedModel, spec: ReplicaSpec) -> None:
        dtype = next(model.parameters()).dtype
        self.slots = Slots(spec.max_num_seqs, spec.max_model_len)
        config = model.config.get_text_config()
        self.cache = SlotCache(
            config, spec.max_num_seqs, spec.max_model_len, spec.cache_positions, dtype, model.device,
            blocked=kernels.usable(model.device, dtype) and kv_shape(config)[1] % BLOCK == 0,
        )  # fmt: skip
        self.prefixes = PrefixCache(self.cache, spec.prefix_blocks)
        stops = sorted(set(spec.stop_tokens))
        self.scheduler = Scheduler(self.slots, self.cache, self.prefixes, spec.max_num_batched_tokens, stops)
        self.weights = LiveWeights(model)
        self.runner = ModelRunner(model, self.cache, self.slots)
        self.version = 0
        self.requests: dict[int, Request] = {}
        self.steps = self.generated_tokens = 0
        self._updates: list[Update] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, submit: Submit) -> None:
        """Queue a request."""
        request = Request(submit)
        self.requests[request.id] = request
        self.scheduler.add(request)

    @torch.inference_mode()
    def abort(self, abort: Abort) -> None:
        """End a request, or one of its choices, with what there is."""
        request = self.requests.get(abort.request)
        if request is None:
            return
        chosen = request.sequences if abort.index is None else [request.sequences[abort.index]]
        for sequence in chosen:
            if not sequence.ended:
                self._end(sequence, None if abort.silent else "abort")

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass, and a token for every sequence that is through with its prompt."""
        plan = self.scheduler.plan()
        if plan.empty:
            return
        logits, rows = self.runner.forward(plan)
        ended = [sequence for sequence, _ in plan.chunks if sequence.prefilled]
        self.slots.start_decoding(len(ended))
        for sequence in ended:
            sequence.note_version(self.version, sequence.generated)
            if not sequence.generated:
                self.prefixes.store(sequence.tokens, sequence.slot)
        # The last first: those that wait for the earliest then stand at the head of the queue.
        for sequence in reversed(ended):
            self.scheduler.prefilled(sequence)
        self.steps += 1
        if len(rows):
            self._draw(logits, rows)

    @torch.inference_mode()
    def commit(self, version: int, inflight: Inflight) -> float:
        """Put the staged weights to use, as ``version``. Returns the seconds it took.

        With "wait" the caller has seen to it that nothing runs, see :meth:`close_admission`.
        """
        started = time.perf_counter()
        self.weights.commit()
        self.version = version
        self.scheduler.weights_changed(recompute=inflight == "recompute")
        for sequence in self.slots.occupants[: self.slots.decoding]:
            sequence.note_version(version, int(self.slots.generated[sequence.slot]))
        self.scheduler.closed = False
        return time.perf_counter() - started

    def close_admission(self) -> bool:
        """Let nobody begin until the next commit. Returns whether all that had begun have ended."""
        self.scheduler.closed = True
        return not self.scheduler.has_work

    def take_updates(self) -> list[Update]:
        """What has happened since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def load(self, idle_seconds: float) -> Load:
        """State and counters."""
        tokens = int(self.slots.length[: self.slots.used].sum())
        return Load(
            running=self.slots.used,
            waiting=self.scheduler.waiting_count,
            tokens=tokens,
            generated_tokens=self.generated_tokens,
            steps=self.steps,
            cache_usage=min(1.0, tokens / self.cache.capacity),
            prefix_queries=self.prefixes.queries,
            prefix_hits=self.prefixes.hits,
            preemptions=self.scheduler.preemptions,
            idle_seconds=idle_seconds,
        )

    def _draw(self, logits: torch.Tensor, rows: np.ndarray) -> None:
        slots = self.slots
        if slots.special[rows].any():
            adjust(logits, rows, slots)
        drawn, chosen, logprobs = sample(logits, slots.sampling_rows(rows))
        tokens, values = drawn.cpu().numpy(), chosen.cpu().numpy()
        stopped, full = slots.append(rows, tokens, values)
        self.generated_tokens += len(rows)
        streaming = [slots.occupants[row] for row in rows[slots.streams[rows]]]
        # Whom first, then out: releasing a slot moves another sequence into it.
        broken = [slots.occupants[row] for row in rows[~np.isfinite(values)]]
        by_stop = [slots.occupants[row] for row in rows[stopped]]
        by_length = [slots.occupants[row] for row in rows[full]]
        self._note_alternatives(streaming, rows, logprobs)
        if broken:
            self._fail({sequence.request for sequence in broken})
        for ending, reason in ((by_stop, "stop"), (by_length, "length")):
            for sequence in ending:
                if not sequence.ended:
                    self._end(sequence, reason)  # type: ignore[arg-type]
        for sequence in streaming:
            if sequence.request.stream and not sequence.ended:
                self._report(sequence, None)

    def _note_alternatives(self, sequences: list[Sequence], rows: np.ndarray, logprobs: torch.Tensor) -> None:
        """Keep the most likely tokens beside the one that was drawn. logprobs [rows, vocabulary]."""
        for sequence in sequences:
            count = min(sequence.request.sampling.alternatives, logprobs.shape[1])
            if count:
                top = logprobs[int(np.searchsorted(rows, sequence.slot))].topk(count)
                sequence.alternatives.append((top.indices.cpu().numpy(), top.values.cpu().numpy()))

    def _end(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """Take a sequence out, and report what it generated; reason None: nobody wants to know."""
        if sequence.slot >= 0 and sequence.slot < self.slots.decoding:
            versions = {version for version, _ in sequence.boundaries}
            # Keys and values of several versions are nobody else's; the last token's are not in the cache.
            if versions == {self.version}:
                slot = sequence.slot
                count = int(self.slots.generated[slot])
                tokens = np.concatenate([sequence.request.prompt, self.slots.out_tokens[slot, : count - 1]])
                self.prefixes.store(tokens, slot)
        self.scheduler.remove(sequence)
        sequence.ended = True
        if reason is not None:
            self._report(sequence, reason)
        if sequence.request.finished:
            self.requests.pop(sequence.request.id, None)

    def _report(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """Tell what has been generated since the last report."""
        if sequence.slot >= 0:
            count = int(self.slots.generated[sequence.slot])
            tokens = self.slots.out_tokens[sequence.slot, sequence.sent : count]
            logprobs = self.slots.out_logprobs[sequence.slot, sequence.sent : count]
        else:
            count = sequence.generated
            tokens = sequence.tokens[len(sequence.request.prompt) + sequence.sent :].astype(np.int32)
            logprobs = sequence.logprobs[sequence.sent :]
        delta = ChoiceDelta(
            index=sequence.index,
            token_ids=tokens.tobytes(),
            logprobs=logprobs.tobytes(),
            versions=sequence.version_spans(sequence.sent, count),
            finish_reason=reason,
        )
        if sequence.alternatives:
            ids, values = zip(*sequence.alternatives, strict=True)
            delta.top_ids = np.concatenate(ids).astype("<i4").tobytes()
            delta.top_logprobs = np.concatenate(values).astype("<f4").tobytes()
            sequence.alternatives.clear()
        sequence.sent = count
        self._updates.append(Update(request=sequence.request.id, delta=delta))

    def _fail(self, requests: set[Request]) -> None:
        """Give up requests whose probabilities are not finite, and keep what they left behind from the others."""
        failure = (
            f"weights of version {self.version} give probabilities that are not finite (has the training diverged?)"
        )
        for request in requests:
            self._updates.append(Update(request=request.id, failure=failure))
            for sequence in request.sequences:
                if not sequence.ended:
                    self._end(sequence, None)
        self.cache.discard_non_finite()
