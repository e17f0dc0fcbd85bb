"""The state of running sequences, one row a slot, in arrays, so that a step costs no Python work per token.

Slots ``[0, decoding)`` generate; slots ``[decoding, used)`` are being prefilled. There are no holes: when a
sequence leaves, another one moves into its slot.
"""

import numpy as np

from outrider.server.limits import MAX_STOP_TOKENS
from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.sampler import SamplingRows
from outrider.server.torch_engine.sequence import Sequence


class Slots:
    """Arrays over slots, and who occupies them. special: the slot's logits need more than temperature, top-k, min-p
    and top-p, see ``logits``; streams: its tokens are reported with every step, or alternatives are asked for."""

    def __init__(self, count: int, max_positions: int) -> None:
        self.count = count
        self.used = 0
        self.decoding = 0
        self.occupants: list[Sequence] = []
        self.token = np.zeros(count, dtype=np.int64)  # the latest token, not yet in the cache
        self.length = np.zeros(count, dtype=np.int64)  # positions in the cache
        self.generated = np.zeros(count, dtype=np.int64)
        self.limit = np.zeros(count, dtype=np.int64)  # generated tokens at which the sequence ends
        self.temperature = np.zeros(count, dtype=np.float32)
        self.top_p = np.zeros(count, dtype=np.float32)
        self.top_k = np.zeros(count, dtype=np.int64)
        self.min_p = np.zeros(count, dtype=np.float32)
        self.seed = np.zeros(count, dtype=np.uint64)
        self.stops = np.full((count, MAX_STOP_TOKENS), -1, dtype=np.int64)
        self.special = np.zeros(count, dtype=bool)
        self.streams = np.zeros(count, dtype=bool)
        self.out_tokens = np.zeros((count, max_positions), dtype=np.int32)
        self.out_logprobs = np.zeros((count, max_positions), dtype=np.float32)
        self._arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]

    def occupy(self, sequence: Sequence, default_stops: list[int]) -> int:
        """Give ``sequence`` a slot at the end, to be prefilled. Returns the slot."""
        slot, sampling, generated = self.used, sequence.request.sampling, sequence.generated
        self.used += 1
        self.occupants.append(sequence)
        sequence.slot = slot
        self.length[slot] = sequence.cached
        self.generated[slot] = generated
        self.limit[slot] = sampling.max_tokens
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = max(sampling.top_k, 0)
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = sequence.seed
        stops = [*([] if sampling.ignore_eos else default_stops), *sampling.stop_token_ids]
        self.stops[slot] = -1
        self.stops[slot, : len(stops)] = stops
        self.special[slot] = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or bool(sampling.logit_bias)
            or sampling.min_tokens > generated
        )
        self.streams[slot] = sequence.request.stream or sampling.alternatives > 0
        if generated:
            self.out_tokens[slot, :generated] = sequence.tokens[-generated:]
            self.out_logprobs[slot, :generated] = sequence.logprobs
        return slot

    def start_decoding(self, count: int) -> None:
        """The first ``count`` prefilling slots are prefilled."""
        self.decoding += count

    def take_out(self, sequence: Sequence, cache: SlotCache) -> None:
        """Free the slot of ``sequence``, which keeps what it has generated.

        The last decoding slot fills the hole, and the very last one the hole which that leaves.
        """
        slot = sequence.slot
        count = int(self.generated[slot])
        if count > sequence.generated:
            new = self.out_tokens[slot, sequence.generated : count].astype(np.int64)
            sequence.tokens = np.concatenate([sequence.tokens, new])
            sequence.logprobs = self.out_logprobs[slot, :count].copy()
        sequence.slot, sequence.cached = -1, 0
        if slot < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, slot, cache)
            slot = self.decoding
        self.used -= 1
        self._move(self.used, slot, cache)
        self.occupants.pop()

    def _move(self, source: int, target: int, cache: SlotCache) -> None:
        if source == target:
            return
        for array in self._arrays:
            array[target] = array[source]
        cache.copy(source, target, 1, int(self.length[source]))
        self.occupants[target] = self.occupants[source]
        self.occupants[target].slot = target

    def sampling_rows(self, rows: np.ndarray) -> SamplingRows:
        """Sampling parameters of these slots. rows: int64 [n]."""
        return SamplingRows(
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            counter=self.generated[rows],
        )

    def append(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append one token to each of ``rows``; returns which hit a stop token and which their limit: bool [n]."""
        at = self.generated[rows]
        self.out_tokens[rows, at] = tokens
        self.out_logprobs[rows, at] = logprobs
        self.token[rows] = tokens
        self.generated[rows] = at + 1
        stopped = (self.stops[rows] == tokens[:, None]).any(axis=1)
        return stopped, ~stopped & (at + 1 >= self.limit[rows])
