"""Which part of a tensor a rank has, and which part of it is for that rank to publish and to save.

What lies outside the decoder's blocks is shared out by rows over all ranks of a copy of the model; so is everything
without tensor parallelism. With it, peers share out a block's linear layers, by rows or by columns, or have a parameter
each; what a peer has then is shared out by rows over the shards, which are the ranks that have that peer's place. A
shard's rows always lie together.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

#: Dimensions of meshes: ranks that share out rows, and those that compute a layer together.
PEERS, RANKS = "peers", "ranks"


@dataclass(frozen=True)
class Seat:
    """The place of a rank among those that have a copy of the model between them: which of ``parts`` it is, of which
    ``peers`` at a time, next to each other, compute layers together."""

    index: int
    parts: int
    peers: int = 1

    @property
    def peer(self) -> int:
        """Which of its peers."""
        return self.index % self.peers


def split_dimension(tensor: DTensor) -> int | None:
    """The dimension that peers share out; None where each has all of it, or there are no peers."""
    if PEERS in (tensor.device_mesh.mesh_dim_names or ()) and isinstance(placement := tensor.placements[-1], Shard):
        return placement.dim
    return None


def held_by_every_peer(tensor: Tensor) -> bool:
    """Whether each peer has the same as the others. For tensors that are sharded with peers."""
    if not isinstance(tensor, DTensor) or RANKS in (tensor.device_mesh.mesh_dim_names or ()):
        return False
    return split_dimension(tensor) is None


def part_of(tensor: Tensor, seat: Seat) -> tuple[range, ...]:
    """What the rank at ``seat`` has of ``tensor``: a range for each dimension. All of what is not sharded."""
    part = [range(size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tuple(part)
    index, parts = seat.index, seat.parts
    if RANKS not in (tensor.device_mesh.mesh_dim_names or ()):
        index, parts = index // seat.peers, parts // seat.peers
        if (dimension := split_dimension(tensor)) is not None:
            part[dimension] = _share(part[dimension], seat.peers, seat.peer)
    part[0] = _share(part[0], parts, index)
    return tuple(part)


def answers_for(tensor: Tensor, seat: Seat) -> bool:
    """Whether what the rank at ``seat`` has is counted, published and saved by it. Of ranks that have the same, the
    first one does that."""
    if isinstance(tensor, DTensor):
        return seat.peer == 0 or not held_by_every_peer(tensor)
    return seat.index == 0


def has_columns(tensor: Tensor) -> bool:
    """Whether each peer has some columns of its rows, instead of whole ones."""
    return isinstance(tensor, DTensor) and split_dimension(tensor) == 1


def first_row(tensor: Tensor, seat: Seat) -> int:
    """Of the whole ones that the rank at ``seat`` publishes. Peers that have columns of the same rows exchange them, so
    that each has a share of the rows."""
    rows = part_of(tensor, seat)[0]
    return (_share(rows, seat.peers, seat.peer) if has_columns(tensor) else rows).start


def share_of(size: int, parts: int, index: int) -> range:
    """The rows of a parameter of ``size`` rows that FSDP gives to the rank that is ``index`` of ``parts``."""
    rows = -(-size // parts)
    return range(min(size, index * rows), min(size, (index + 1) * rows))


def _share(rows: range, parts: int, index: int) -> range:
    share = share_of(len(rows), parts, index)
    return rows[share.start : share.stop]
