"""Attention token by token, by the compiled kernels: on the CPU in float32."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from outrider.server.torch_engine import kernels
from outrider.server.torch_engine.cache import SlotCache


class TokenAttention:
    """Attends with as many threads as torch uses, each for heads of its own."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        threads = max(1, min(torch.get_num_threads(), cache.heads))
        self._shares = list(shares(cache.heads, threads))
        # The first share is this thread's.
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="attention") if threads > 1 else None

    def layout(self, slots: Tensor, positions: Tensor) -> "TokenLayout":
        """For a step whose tokens go to ``positions`` of ``slots``: int64 [tokens] each."""
        return TokenLayout(self, slots, positions)

    def for_all_heads(self, work: Callable[[range], None]) -> None:
        """Call ``work`` with parts of the key-value heads, at the same time, until all are done."""
        first, *others = self._shares
        submitted = [self._pool.submit(work, share) for share in others] if self._pool else []
        work(first)
        for future in submitted:
            future.result()


class TokenLayout:
    """See :class:`attention.StepLayout`."""

    def __init__(self, attention: TokenAttention, slots: Tensor, positions: Tensor) -> None:
        self.cache, self._attention = attention.cache, attention
        self._slots, self._positions = slots, positions

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None,
        scale: float, output: Tensor,
    ) -> None:  # fmt: skip
        """Put keys and values into the cache, and attend."""
        cached_keys, cached_values = self.cache.layer_keys[layer], self.cache.layer_values[layer]

        def work(heads: range) -> None:
            kernels.attend(
                queries, keys, values, cached_keys, cached_values, self._slots, self._positions, window, scale,
                softcap, heads, output,
            )  # fmt: skip

        self._attention.for_all_heads(work)


def shares(count: int, parts: int) -> Iterator[range]:
    """``range(count)`` in ``parts`` parts of about the same length."""
    for part in range(parts):
        yield range(count * part // parts, count * (part + 1) // parts)
