"""Keys and values of the running sequences: one slot a sequence, in one rectangle whose area is bounded."""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

#: Positions of a slot come in powers of two of this.
LEAST_POSITIONS = 64
#: Positions of a block.
BLOCK = 16


class SlotCache(Cache):
    """Keys ``[layers, slots, heads, blocks, head size, 16]``, values ``[layers, slots, heads, positions, head size]``.

    A block is 16 neighbouring positions. In memory keys lie as their attention reads them best. ``blocked``: just so,
    for the compiled kernels. Else transposed, ``[layers, slots, heads, head size, positions]``, so that scores are a
    product of matrices as they lie: on the CPU a decoding step's attention by torch takes 0.6 of the time then.

    It is handed to the model as its ``past_key_values``; attention functions write and read it (see ``attention``).

    ``slots x positions`` never exceeds ``capacity``: the longer the longest sequence, the fewer there can be. Behind
    the last slot there is a spare one that nobody reads, for rows of padding to write to.
    """

    def __init__(
        self, config: PretrainedConfig, max_slots: int, max_positions: int, capacity: int, dtype: torch.dtype,
        device: torch.device, blocked: bool = False,
    ) -> None:  # fmt: skip
        """capacity: positions of all slots together; at least ``max_positions``, rounded up as positions are."""
        super().__init__(layers=[])
        self.layer_count = config.num_hidden_layers
        self.heads, self.head_size = kv_shape(config)
        self.max_slots, self.max_positions, self.capacity = max_slots, round_positions(max_positions), capacity
        self.dtype, self.device, self.blocked = dtype, device, blocked
        self.slots = self.positions = 0
        self.keys = self.values = torch.zeros(0, dtype=dtype, device=device)
        self._allocate(LEAST_POSITIONS, 0, 0)

    def slots_at(self, positions: int) -> int:
        """Sequences that fit when each may have ``positions``."""
        return min(self.max_slots, self.capacity // round_positions(positions))

    def resize(self, positions: int, used: int) -> None:
        """Give every slot room for ``positions``; the first ``used`` slots are kept, as far as they fit."""
        rounded = min(round_positions(positions), self.max_positions)
        if rounded != self.positions:
            self._allocate(rounded, min(used, self.slots_at(rounded)), min(rounded, self.positions))

    def _allocate(self, positions: int, kept_slots: int, kept_positions: int) -> None:
        slots = self.slots_at(positions)
        shape = (self.layer_count, slots + 1, self.heads)
        # Zeros, not empty: masked positions are multiplied by a weight of zero, and 0 x NaN is NaN. Memory that is
        # only zeroed and never used is not taken from the machine.
        blocks = positions // BLOCK
        if self.blocked:
            lying = keys = torch.zeros((*shape, blocks, self.head_size, BLOCK), dtype=self.dtype, device=self.device)
        else:
            lying = torch.zeros((*shape, self.head_size, positions), dtype=self.dtype, device=self.device)
            keys = lying.unflatten(-1, (blocks, BLOCK)).transpose(-3, -2)
        values = torch.zeros((*shape, positions, self.head_size), dtype=self.dtype, device=self.device)
        if kept_slots:
            kept_blocks = kept_positions // BLOCK
            keys[:, :kept_slots, :, :kept_blocks] = self.keys[:, :kept_slots, :, :kept_blocks]
            values[:, :kept_slots, :, :kept_positions] = self.values[:, :kept_slots, :, :kept_positions]
        self.keys, self.values = keys, values
        self.layer_keys, self.layer_values = list(lying.unbind(0)), list(values.unbind(0))
        self.slots, self.positions = slots, positions

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values ``[tokens, heads, size]`` into a layer: the first n go to ``positions`` of ``slots``,
        int64 [n] each; those behind them are padding. Not for a blocked cache."""
        self.layer_keys[layer][slots, :, :, positions] = keys[: len(slots)]
        self.layer_values[layer][slots, :, positions] = values[: len(slots)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Asked for by attention layers before they attend: the attention function itself writes what is new."""
        return key_states, value_states

    def copy(self, source: int, first: int, count: int, positions: int) -> None:
        """Copy the first ``positions`` of slot ``source`` to the ``count`` slots from ``first`` on."""
        targets, sources = slice(first, first + count), slice(source, source + 1)
        blocks = -(-positions // BLOCK)
        self.keys[:, targets, :, :blocks] = self.keys[:, sources, :, :blocks]
        self.values[:, targets, :, :positions] = self.values[:, sources, :, :positions]

    def discard_non_finite(self) -> None:
        """Make masked positions harmless again, see above, after a step that computed something not finite."""
        for tensor in (self.keys, self.values):
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked for by some models for a default of position ids, which are always given here."""
        return 0


def round_positions(positions: int) -> int:
    """The next power of two, from ``LEAST_POSITIONS`` on."""
    return max(LEAST_POSITIONS, 1 << (positions - 1).bit_length())


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Key-value heads and head size of a model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_size


def position_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take."""
    heads, head_size = kv_shape(config)
    return 2 * config.num_hidden_layers * heads * head_size * dtype.itemsize
