"""The state of running sequences, one row a slot, in arrays, so that a step costs no Python work per token.

Slots ``[0, decoding)`` generate; slots ``[decoding, used)`` are being prefilled. There are no holes: when a
sequence leaves, another one moves into its slot.
"""

import numpy as np

from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.sampler import SamplingRows
from outrider.server.torch_engine.sequence import Sequence

#: Stop tokens kept per slot; a request with more is refused.
MAX_STOP_TOKENS = 16


class Slots:
    """Arrays over slots, and who occupies them."""

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
        self.seed = np.zeros(count, dtype=np.uint64)
        self.stops = np.full((count, MAX_STOP_TOKENS), -1, dtype=np.int64)
        self.out_tokens = np.zeros((count, max_positions), dtype=np.int32)
        self.out_logprobs = np.zeros((count, max_positions), dtype=np.float32)
        self._arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]

    @property
    def free(self) -> int:
        return self.count - self.used

    def occupy(self, sequence: Sequence, stop_tokens: list[int]) -> int:
        """Give ``sequence`` a slot at the end, to be prefilled. Returns the slot."""
        slot, sampling = self.used, sequence.request.sampling
        self.used += 1
        self.occupants.append(sequence)
        sequence.slot = slot
        self.length[slot] = sequence.cached
        self.generated[slot] = 0
        self.limit[slot] = sampling.max_tokens
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = max(sampling.top_k, 0)
        self.seed[slot] = sequence.seed
        self.stops[slot] = -1
        self.stops[slot, : len(stop_tokens)] = stop_tokens
        return slot

    def start_decoding(self, count: int) -> None:
        """The first ``count`` prefilling slots are prefilled."""
        self.decoding += count

    def release(self, slot: int, cache: SlotCache) -> None:
        """Free ``slot``: the last decoding slot fills the hole, and the very last one the hole which that leaves."""
        self.occupants[slot].slot = -1
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
        cache.copy(source, target, int(self.length[source]))
        self.occupants[target] = self.occupants[source]
        self.occupants[target].slot = target

    def sampling_rows(self, rows: np.ndarray) -> SamplingRows:
        """Sampling parameters of these slots. rows: int64 [n]."""
        return SamplingRows(
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
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
