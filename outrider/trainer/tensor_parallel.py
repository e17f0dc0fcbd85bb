"""Tensor parallelism: peers, which are ranks next to each other, compute every decoder block together.

Which linear layers they share out, and how, is the model's own plan (``tp_plan`` of Transformers). FSDP then shards
what a peer has over the other ranks. What is in no block, as embeddings and the projection onto the vocabulary, is left
out of it: FSDP shares it out over all ranks, peers as well, and each peer projects its part of the tokens.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from outrider.contract.errors import UserError
from outrider.trainer.layout import held_by_every_peer
from outrider.trainer.peers import add_up, all_parts, enter, own_part
from outrider.trainer.sharding import blocks_of, local


class Style(NamedTuple):
    """How peers share out a linear layer. dimension: of its weight [columns that come out, columns that go in]. whole:
    whether it takes, or gives, all columns on every peer, where it has a part of them."""

    dimension: int
    whole: bool = False


#: By what Transformers calls them; the last two names are those of former versions.
STYLES = {
    "colwise": Style(0),
    "rowwise": Style(1),
    "colwise_gather_output": Style(0, whole=True),
    "rowwise_split_input": Style(1, whole=True),
    "colwise_rep": Style(0, whole=True),
    "rowwise_rep": Style(1, whole=True),
}
#: Of a module that each peer has, for its own heads: its gradient is the sum over peers.
SUMMED = "replicated_with_grad_allreduce"

#: What the configuration calls the numbers that peers share out.
_SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

Plan = dict[str, str]


def plan_of(model: PreTrainedModel, peers: int) -> Plan:
    """The style of each module in the decoder's blocks that has one. Raises UserError where ``peers`` cannot compute
    the model together."""
    rules: Plan = dict(model.tp_plan or {})
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    modules = {path: module for path, module in model.named_modules() if id(module) in inside}
    plan = {path: rule for path in modules if (rule := rules.get(_wildcard(path))) is not None}
    refused = f"--tensor_parallel_size {peers}: {type(model).__name__}"
    remedy = "leave it out, and the model is sharded by FSDP alone"
    if not plan:
        raise UserError(f"{refused} has no plan for it in this version of Transformers; {remedy}")
    for name, path in _unknown(modules, plan, rules):
        raise UserError(f"{refused} has {name} for {path}, which this trainer does not take; {remedy}")
    _check_sizes(model, plan, peers, refused)
    return plan


def _unknown(modules: dict[str, nn.Module], plan: Plan, rules: Plan) -> Iterator[tuple[str, str]]:
    """What of a plan is not taken, and for which modules and parameters."""
    for path, module in modules.items():
        style = plan.get(path)
        if style is not None and style != SUMMED and not (style in STYLES and type(module) is nn.Linear):
            yield f"the style {style!r} of a {type(module).__name__}", _wildcard(path)
        for name, _ in module.named_parameters(path, recurse=False):
            if (rule := rules.get(_wildcard(name))) is not None:
                yield f"the style {rule!r} of a parameter", _wildcard(name)
    # What is computed from a part of the heads, or columns, has a part of its gradient; who that is, a plan must say.
    split = {path.rpartition(".")[0] for path, style in plan.items() if style == "colwise"}
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        if path in split and any(True for _ in module.parameters(recurse=False)):
            yield "no style", f"parameters of {_wildcard(path)} itself"
        if parent in split and path not in plan and any(True for _ in module.parameters()):
            yield "no style", _wildcard(path)


def _check_sizes(model: PreTrainedModel, plan: Plan, peers: int, refused: str) -> None:
    """Raises UserError where heads or columns do not come out even."""
    text = model.config.get_text_config()
    sizes = {name: size for name in _SHARED_OUT if isinstance(size := getattr(text, name, None), int)}
    for path, name in plan.items():
        if name in STYLES:
            columns = model.get_parameter(f"{path}.weight").shape[STYLES[name].dimension]
            sizes[f"columns of {path}:"] = columns
    uneven = [f"{name} {size}" for name, size in sizes.items() if size % peers]
    if uneven:
        common = math.gcd(*sizes.values())
        good = [str(size) for size in range(1, common + 1) if common % size == 0]
        raise UserError(f"{refused} has {uneven[0]}, which {peers} does not divide; give {' or '.join(good)}")


def _wildcard(path: str) -> str:
    """As plans name it: with a star for each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


class _Columns(nn.Linear):
    """A linear layer of which a peer has the weights of some columns: parts that know their whole. What is computed
    with them are plain tensors, which compile with sizes that vary."""

    mesh: DeviceMesh
    whole: bool


class _ColumnsOut(_Columns):
    def forward(self, columns: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        found = linear(enter(columns, self.mesh), local(self.weight), bias)
        return all_parts(found, -1, self.mesh) if self.whole else found


class _ColumnsIn(_Columns):
    def forward(self, columns: Tensor) -> Tensor:
        own = own_part(columns, -1, self.mesh) if self.whole else columns
        found = add_up(linear(own, local(self.weight)), self.mesh)
        return found if self.bias is None else found + self.bias


def split(model: PreTrainedModel, plan: Plan, mesh: DeviceMesh) -> None:
    """Share out the linear layers over the peers of ``mesh``, before FSDP shards what each has. The model has no memory
    yet."""
    for path, name in plan.items():
        if name in STYLES:
            _share_out(model.get_submodule(path), STYLES[name], mesh)


def _share_out(module: nn.Module, style: Style, mesh: DeviceMesh) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > style.dimension:  # a bias is of the columns that come out
            part = distribute_tensor(parameter, mesh, [Shard(style.dimension)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
    # As FSDP does it. A forward of each module's own would have the compiler compile each of them.
    module.__class__ = _ColumnsOut if style.dimension == 0 else _ColumnsIn
    module.mesh, module.whole = mesh, style.whole  # type: ignore[assignment]


@torch.no_grad()
def join_gradients(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Make the gradients of what every peer has those of all peers, once a step: the sum of what each has of its own
    heads, and the mean where each has the whole, which are equal but for rounding that might drift apart."""
    summed = tuple(f"{path}." for path, style in plan.items() if style == SUMMED)
    gradients = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and held_by_every_peer(parameter):
            gradient = local(parameter.grad)
            gradients.append(gradient if name.startswith(summed) else gradient.div_(mesh.size()))
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=mesh.get_group())
    for gradient, joined in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(joined.view_as(gradient))


def over_peers(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], hidden: Tensor, targets: Tensor, mesh: DeviceMesh
) -> tuple[Tensor, Tensor | None]:
    """What ``compute`` makes of hidden states [tokens, hidden] and targets [tokens], of which each peer takes its part:
    one or two tensors [tokens], on all peers.

    A peer's gradient of its part is taken times the number of peers, and that of the hidden states divided by it. So
    whatever is in no block has its gradient as the mean over peers, be it used for a peer's own tokens or for all.
    """
    tokens, peers = len(targets), mesh.size()
    padding = -tokens % peers if tokens else peers
    own = own_part(pad(hidden, (0, 0, 0, padding)), 0, mesh, scale=1 / peers)
    first, second = compute(own, own_part(pad(targets, (0, padding)), 0, mesh))

    def whole(part: Tensor) -> Tensor:
        return all_parts(part, 0, mesh, scale=peers)[:tokens].clone()  # FSDP warns of views

    return whole(first), None if second is None else whole(second)
