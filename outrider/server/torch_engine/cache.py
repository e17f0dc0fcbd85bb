"""Keys and values of the running sequences: one slot a sequence, preallocated, grown by doubling."""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values, per layer ``[slots, key-value heads, positions, head size]``.

    It is handed to the model as its ``past_key_values``: each attention layer writes the new keys and values of
    the step through :meth:`update`, and the attention function reads whole slots through :meth:`layer`.
    """

    def __init__(self, config: PretrainedConfig, slots: int, max_positions: int, dtype: torch.dtype, device: str):
        super().__init__(layers=[])
        self.heads, self.head_size = kv_shape(config)
        self.slots, self.max_positions = slots, -(-max_positions // 64) * 64
        self.positions = 64
        self._shape = (slots, self.heads, self.positions, self.head_size)
        count = config.num_hidden_layers
        # Zeros, not empty: masked positions are multiplied by a weight of zero, and 0 x NaN is NaN.
        self.keys = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in range(count)]
        self.values = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in range(count)]
        self._write_slots = torch.zeros(0, dtype=torch.long, device=device)
        self._write_positions = torch.zeros(0, dtype=torch.long, device=device)

    def reserve(self, positions: int) -> None:
        """Make room for ``positions`` in every slot, doubling so that the copying is amortized."""
        if positions <= self.positions:
            return
        grown = min(max(positions, 2 * self.positions), self.max_positions)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros((self.slots, self.heads, grown, self.head_size))
                new[:, :, : self.positions] = old
                tensors[layer] = new
        self.positions = grown

    def begin_step(self, slots: Tensor, positions: Tensor) -> None:
        """Where the new keys and values of this step go: int64 [tokens] each."""
        self._write_slots, self._write_positions = slots, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values ``[1, heads, tokens, head size]``; tokens beyond those announced in
        :meth:`begin_step` are padding and are not written. Returns its arguments."""
        count = len(self._write_slots)
        self.keys[layer_idx][self._write_slots, :, self._write_positions] = key_states[0, :, :count].transpose(0, 1)
        self.values[layer_idx][self._write_slots, :, self._write_positions] = value_states[0, :, :count].transpose(0, 1)
        return key_states, value_states

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first ``positions`` of slot ``source`` to slot ``target``."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :positions] = tensor[source, :, :positions]

    def discard_non_finite(self) -> None:
        """Make masked positions harmless again, see above, after a step that computed something not finite."""
        for tensor in self.values:
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked for by some models for a default of position ids, which are always given here."""
        return 0


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Key-value heads and head size of a model."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_size


def slot_bytes(config: PretrainedConfig, max_positions: int, dtype: torch.dtype) -> int:
    """Bytes of one slot of ``max_positions``."""
    heads, head_size = kv_shape(config)
    return 2 * config.num_hidden_layers * heads * head_size * max_positions * dtype.itemsize
