"""A model's weights, from where Transformers finds them to the ranks.

Rank 0 alone loads the model, on the CPU and by Transformers' own means, which know every format, conversion and tie.
All ranks make the model without memory, shard it, and get their rows, tensor by tensor: no device holds more than its
share, and no host a second copy.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from outrider.contract.errors import UserError
from outrider.trainer.config import ModelConfig
from outrider.trainer.layout import part_of
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import Whole, local


def load_model(config: ModelConfig, source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in ``source``, a directory or hub id, on the CPU. Raises UserError."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {source}: cannot be loaded: {error}") from error


def make_empty(config: ModelConfig, architecture: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(architecture),
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.trust_remote_code,
        )


def _attention(config: ModelConfig) -> str | None:
    """Variable-length attention takes the place of the model's own when it is known that the model can be used so."""
    return None if config.attn_impl == "varlen" else config.attn_impl


@torch.no_grad()
def fill(root: Whole, whole: PreTrainedModel | None, ranks: Ranks, device: torch.device, offload: bool) -> None:
    """Give the sharded, empty model of ``root`` its memory, and what ``whole`` holds, which rank 0 has. All ranks call
    it. device: where it computes; with ``offload`` parameters stay in host memory."""
    # Of the root, which FSDP has parameters of as well: it pads and pins them now, and not when they are first used and
    # others hold on to them.
    root.to_empty(device="cpu" if offload else device)
    model = root.model
    given = {} if whole is None else dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        _fill_part(parameter, given.get(name), ranks)
    # What a checkpoint does not hold, such as the frequencies of rotary embeddings, is made when a model is loaded.
    made = {} if whole is None else {name: holder[key] for name, holder, key in _beside_parameters(whole)}
    for name, holder, key in _beside_parameters(model):
        value = made[name].contiguous() if ranks.leads else torch.empty_like(holder[key], device="cpu")
        if ranks.size > 1:
            dist.broadcast(value, 0)
        holder[key] = value.to(device, copy=True)
    if whole is not None:
        model.generation_config = whole.generation_config


def _fill_part(parameter: Tensor, whole: Tensor | None, ranks: Ranks) -> None:
    """This rank's part of a parameter; whole: all of it, on rank 0."""
    mine = local(parameter)
    if whole is None:
        part = torch.empty(mine.shape, dtype=parameter.dtype)
        if part.numel():
            dist.recv(part, 0)
        mine.copy_(part)
        return
    for rank in range(ranks.size):
        place = tuple(slice(span.start, span.stop) for span in part_of(parameter, ranks.seat(rank)))
        if rank == 0:
            mine.copy_(whole[place])
        elif whole[place].numel():
            dist.send(whole[place].to(parameter.dtype).contiguous(), rank)


def _beside_parameters(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name and place of every tensor that is no parameter: buffers, and those that a module keeps as attributes."""
    for path, module in model.named_modules():
        for holder in (module._buffers, vars(module)):
            for key in [key for key, value in holder.items() if isinstance(value, Tensor)]:
                yield f"{path}.{key}", holder, key
