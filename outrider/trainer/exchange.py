"""The rows of the weights that a rank publishes, where peers have columns of some of them.

Servers know whole rows alone. So peers that have columns of the same rows exchange them when a version is published,
in the serving precision, and each has some rows whole then: a collective of peers, never of all ranks. Whatever else a
rank publishes is its own memory.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from outrider.trainer.layout import Seat, answers_for, has_columns, share_of
from outrider.trainer.sharding import local


class Exchange:
    """What the rank at ``seat`` publishes. tensors: name → its whole rows, in memory that stays the same over versions;
    those of exchanged columns are up to date after :meth:`refresh`."""

    def __init__(
        self, parameters: Mapping[str, Tensor], seat: Seat, dtype: torch.dtype, peers: DeviceMesh | None
    ) -> None:
        """parameters: by name, as they are sharded. dtype: that servers take."""
        self.tensors: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._seat, self._dtype, self._peers = seat, dtype, peers
        for name, parameter in parameters.items():
            mine = local(parameter.detach())
            if has_columns(parameter):
                self._columns[name] = mine
                rows = len(share_of(len(mine), seat.peers, seat.peer))
                self.tensors[name] = mine.new_empty(rows, parameter.shape[1], dtype=dtype)
            else:
                self.tensors[name] = mine if answers_for(parameter, seat) else mine[:0]

    @torch.no_grad()
    def refresh(self) -> None:
        """Exchange columns for rows; all peers call it, on the thread that computes steps, since collectives of several
        threads could wait for each other. What was published before must have been copied."""
        if self._peers is None:
            return
        count, group = self._seat.peers, self._peers.get_group()
        for name, columns in self._columns.items():
            theirs = [len(share_of(len(columns), count, peer)) for peer in range(count)]
            mine = theirs[self._seat.peer]
            parts = columns.new_empty(count * mine, columns.shape[1], dtype=self._dtype)
            dist.all_to_all_single(parts, columns.to(self._dtype).contiguous(), [mine] * count, theirs, group=group)
            self.tensors[name].view(mine, count, -1).copy_(parts.view(count, mine, -1).transpose(0, 1))
