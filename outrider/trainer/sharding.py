"""FSDP2: every rank keeps a share of each parameter, and of its gradient and optimizer state.

Shares are contiguous rows (PyTorch's ``fully_shard``), so each rank publishes its own and nothing is gathered for that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel


class Whole(nn.Module):
    """A model whose forward pass is ``compute``, which uses every one of its parameters: FSDP gathers what a module
    needs when the module is called, and log-probabilities take the decoder and the projection apart."""

    def __init__(self, model: PreTrainedModel, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, *arguments: Any) -> Any:
        return self.compute(*arguments)


def shard(
    whole: Whole,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
    offload: bool = False,
    holds: bool = False,
    peer_mesh: DeviceMesh | None = None,
) -> None:
    """Block by block, then the rest. mesh: one dimension, or copies x ranks. compute_dtype: in which parameters are
    gathered, None for their own. offload: shares, gradients and optimizer state stay in host memory. holds: what is
    gathered stays, see :func:`hold_until_last`. peer_mesh: the same ranks with peers as the last dimension, over which
    the blocks have been split. Gradients are added up in float32, and not averaged: the loss is divided by the counts
    of all ranks already."""
    keep = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    peers = 1 if peer_mesh is None else peer_mesh.size(-1)
    of_blocks = mesh if peer_mesh is None else peer_mesh[(peer_mesh.mesh_dim_names or ())[:-1]]
    for block in blocks_of(whole.model):
        fully_shard(block, mesh=of_blocks, mp_policy=policy, offload_policy=keep, reshard_after_forward=not holds)
    fully_shard(whole, mesh=mesh, mp_policy=policy, offload_policy=keep)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            # Each peer has the whole gradient of what is in no block.
            module.set_gradient_divide_factor(float(peers) if module is whole else 1.0)
            module.set_force_sum_reduction_for_comms(True)
            if hasattr(module, "set_reduce_scatter_unused_params"):  # from PyTorch 2.12 on
                module.set_reduce_scatter_unused_params(True)  # one rank's tokens may leave some unused, another's not


def may_hold(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> bool:
    """Whether there is room for :func:`hold_until_last`: for whole weights as they are computed with, and for their
    gradients in float32. One rank has little to gain from less; many have what they were taken for to lose."""
    if mesh.size() == 1:
        return True
    if mesh.device_type != "cuda":
        return False
    whole = sum(parameter.numel() for parameter in model.parameters()) * (compute_dtype.itemsize + 4)
    return whole <= torch.cuda.get_device_properties().total_memory / 6


def hold_until_last(whole: Whole, last: bool) -> None:
    """What a step's micro-batches gather stays until the last one's backward pass, and gradients are added up where
    they are made, in float32, until then: ranks exchange both once a step. last: whether the next micro-batch is that.
    """
    assert isinstance(whole, FSDPModule)
    whole.set_reshard_after_backward(last)
    whole.set_requires_gradient_sync(last)


def give_up_gathered(whole: Whole) -> None:
    """Weights are gathered anew when they are next used. Before they are changed: passes without gradients leave some
    gathered, which would be the old ones then."""
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, by what their model says must not be split over devices."""
    names = set(model._no_split_modules or ())
    # Not by the name of the class alone: FSDP has put a class of its own in its place.
    return [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]


def local(tensor: Tensor) -> Tensor:
    """This rank's share of it; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of it. With several ranks this is for all of them to call."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dimension in range(len(placements)):  # of the mesh, one after the other: first shards, then peers
        placements[dimension] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
