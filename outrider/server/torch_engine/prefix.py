"""Keys and values of ended sequences, kept by blocks for later prompts that begin with the same tokens."""

from collections import OrderedDict

import numpy as np
import torch
import xxhash

from outrider.server.torch_engine.cache import BLOCK, SlotCache


class PrefixCache:
    """Blocks of one version of the weights, named by the hash of all tokens up to their end; least recently used go
    first. ``blocks`` 0 switches it off.

    A copy of cached keys and values has the bits that computing them anew would give, see ``model_runner``.
    """

    def __init__(self, cache: SlotCache, blocks: int) -> None:
        self.cache, self.count = cache, blocks
        shape = (cache.layer_count, blocks, cache.heads)
        self._keys = torch.zeros((*shape, cache.head_size, BLOCK), dtype=cache.dtype, device=cache.device)
        self._values = torch.zeros((*shape, BLOCK, cache.head_size), dtype=cache.dtype, device=cache.device)
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(blocks - 1, -1, -1))
        self.queries = self.hits = 0

    def clear(self) -> None:
        """Forget everything: other weights are in use."""
        self._known.clear()
        self._free = list(range(self.count - 1, -1, -1))

    def load(self, tokens: np.ndarray, slot: int) -> int:
        """Fill the beginning of ``slot`` with what is known of ``tokens`` (int64 [n]), all but the last one at most.

        Returns the number of positions filled.
        """
        if not self.count:
            return 0
        self.queries += len(tokens)
        found = []
        for name in block_names(tokens[: len(tokens) - 1]):
            block = self._known.get(name)
            if block is None:
                break
            self._known.move_to_end(name)
            found.append(block)
        if not found:
            return 0
        length, shape = len(found) * BLOCK, (self.cache.layer_count, self.cache.heads)
        blocks = torch.tensor(found, device=self.cache.device)
        # [layers, blocks, heads, 16, size] -> [layers, heads, blocks x 16, size]
        values = self._values[:, blocks].permute(0, 2, 1, 3, 4).reshape(*shape, length, self.cache.head_size)
        self.cache.keys[:, slot, :, : len(found)] = self._keys[:, blocks].transpose(1, 2)
        self.cache.values[:, slot, :, :length] = values
        self.hits += length
        return length

    def store(self, tokens: np.ndarray, slot: int) -> None:
        """Keep the blocks that ``tokens`` (int64 [n], all cached in ``slot``) fill and that are not known yet."""
        if not self.count:
            return
        new = []
        for place, name in enumerate(block_names(tokens)):
            if place >= self.count:
                break
            if name in self._known:
                self._known.move_to_end(name)
            else:
                self._known[name] = self._take()
                new.append((place, self._known[name]))
        if not new:
            return
        places, blocks = torch.tensor(new, device=self.cache.device).unbind(1)
        cache, shape, whole = self.cache, (self.cache.layer_count, self.cache.heads), 1 + new[-1][0]
        values = cache.values[:, slot, :, : whole * BLOCK].reshape(*shape, whole, BLOCK, cache.head_size)
        self._keys[:, blocks] = cache.keys[:, slot, :, places].transpose(1, 2)
        self._values[:, blocks] = values[:, :, places].permute(0, 2, 1, 3, 4)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._known.popitem(last=False)[1]


def block_names(tokens: np.ndarray) -> list[bytes]:
    """Hashes of the whole blocks of ``tokens``, each of everything up to the block's end."""
    digest, data, width = xxhash.xxh3_128(), tokens.astype("<i4").tobytes(), 4 * BLOCK
    names = []
    for end in range(width, len(data) + 1, width):
        digest.update(data[end - width : end])
        names.append(digest.digest())
    return names
