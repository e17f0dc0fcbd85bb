"""What peers, ranks that compute a layer together, exchange in a forward pass, and the gradient of each exchange.

Each works on one dimension of a mesh, with tensors that have the same shape on all of its ranks. The collectives are
PyTorch's functional ones, which a compiled block may have in its graph.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

#: The second is its name before PyTorch 2.13.
_ALL_GATHER = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def enter(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """What all peers have, as each goes on to compute its part from it: the gradient is the sum of theirs."""
    return _Enter.apply(tensor, mesh)


def add_up(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over peers; each goes on with all of it, and so has its whole gradient."""
    return _AddUp.apply(tensor, mesh)


def own_part(tensor: Tensor, dimension: int, mesh: DeviceMesh, scale: float = 1.0) -> Tensor:
    """This peer's part of what all have, which their number divides; the gradient is the parts of all, times
    ``scale``."""
    return _OwnPart.apply(tensor, dimension, mesh, scale)


def all_parts(tensor: Tensor, dimension: int, mesh: DeviceMesh, scale: float = 1.0) -> Tensor:
    """The parts of all peers, one after the other; the gradient, which all have, is this peer's part of it, times
    ``scale``."""
    return _AllParts.apply(tensor, dimension, mesh, scale)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.mesh), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        return _sum(tensor, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dimension: int, mesh: DeviceMesh, scale: float) -> Tensor:
        ctx.dimension, ctx.mesh, ctx.scale = dimension, mesh, scale
        return _slice(tensor, dimension, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _join(gradient * ctx.scale, ctx.dimension, ctx.mesh), None, None, None


class _AllParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dimension: int, mesh: DeviceMesh, scale: float) -> Tensor:
        ctx.dimension, ctx.mesh, ctx.scale = dimension, mesh, scale
        return _join(tensor, dimension, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _slice(gradient, ctx.dimension, ctx.mesh) * ctx.scale, None, None, None


def _sum(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", mesh))


def _join(tensor: Tensor, dimension: int, mesh: DeviceMesh) -> Tensor:
    return functional.wait_tensor(_ALL_GATHER(tensor.contiguous(), dimension % tensor.ndim, mesh))


def _slice(tensor: Tensor, dimension: int, mesh: DeviceMesh) -> Tensor:
    return tensor.chunk(mesh.size(), dimension)[mesh.get_local_rank()].contiguous()
