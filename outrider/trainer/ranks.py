"""The processes of a run, as one of them sees the others: who they are, and what they do together."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from outrider.contract.errors import UserError

#: Seconds for a collective of a step: whoever is not there by then is not coming. A rank that dies closes its
#: connections, which the others notice at once; this is for a host that vanishes.
COLLECTIVE = 600.0
#: Seconds that rank 0 may have nothing to say: it waits for rollouts, or for servers to come up.
ORDER = 48 * 3600.0


def lost_connection(error: RuntimeError) -> str | None:
    """What a collective says whose peer is gone, in a line; None for any other error. Gloo has no type for it."""
    text = str(error)
    kinds = dist.DistNetworkError, dist.DistStoreError
    if isinstance(error, kinds) or "gloo" in text or "remote process exited" in text:
        return text.splitlines()[0].rpartition("] ")[2]
    return None


class Ranks:
    """One process, or torchrun's: rank 0 leads, and the others do as they are told."""

    def __init__(self, shard_across_nodes: bool = True, shard_alone: bool = False) -> None:
        """Join the group that torchrun has described in the environment, where there is one. shard_across_nodes: all
        ranks share one copy of the model; else each node has a copy. shard_alone: a single process has a mesh, too,
        as it needs for mixed precision on a GPU and for offloading."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available()
        if on_gpu and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {self.rank} is process {self.local_rank} of its node, which shows {torch.cuda.device_count()} "
                "GPUs: give each process its own (NPROC_PER_NODE, CUDA_VISIBLE_DEVICES)"
            )
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        #: Whether the other ranks wait for an order, and are not in the middle of something, or gone.
        self.listening = self.size > 1
        self.mesh: DeviceMesh | None = None
        self._orders: Any = None
        #: Ranks that share one copy of the model; with several copies, the first ranks have the first one.
        self.shards = self.size
        if not shard_across_nodes:
            self.shards = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if self.size % self.shards:
                raise UserError(
                    f"--shard_across_nodes false: {self.size} processes are not {self.shards} on each node; give every "
                    "node as many (NPROC_PER_NODE)"
                )
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if self.size > 1:
            patience = datetime.timedelta(seconds=COLLECTIVE)
            dist.init_process_group(backend, timeout=patience)
            self._orders = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=ORDER))
        elif shard_alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self.size > 1 or shard_alone:
            device, copies = "cuda" if on_gpu else "cpu", self.size // self.shards
            if copies > 1:
                self.mesh = init_device_mesh(device, (copies, self.shards), mesh_dim_names=("copies", "shards"))
            else:
                self.mesh = init_device_mesh(device, (self.size,))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def in_first_copy(self) -> bool:
        """Whether this rank's rows are of the copy of the model that is published and saved."""
        return self.rank < self.shards

    @contextlib.contextmanager
    def together(self, order: bytes) -> Iterator[None]:
        """Rank 0 tells the others to do something, and does it as well. Where that fails here, they hang in it: they
        are told nothing more, and whoever has started them ends them when this process has gone."""
        told, self.listening = self.listening, False
        if told:
            self._tell(order)
        yield
        self.listening = told

    def end(self, order: bytes) -> None:
        """The last thing that rank 0 tells, to whoever is still there."""
        told, self.listening = self.listening, False
        if told:
            with contextlib.suppress(RuntimeError):  # somebody is gone, and then all of them will be
                self._tell(order)

    def _tell(self, message: bytes) -> None:
        dist.broadcast(torch.tensor([len(message)]), 0, group=self._orders)
        dist.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0, group=self._orders)

    def hear(self) -> bytes:
        """What rank 0 tells."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0, group=self._orders)
        message = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self._orders)
        return message.numpy().tobytes()

    def gather(self, message: bytes) -> list[bytes]:
        """What each rank has to say, on all of them."""
        if self.size == 1:
            return [message]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, message, group=self._orders)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def put(self, name: str, value: str) -> None:
        """Leave something where :meth:`take` finds it, from any thread."""
        dist.distributed_c10d._get_default_store().set(name, value)

    def take(self, name: str) -> str:
        """What a rank has put there, waiting for it; it is gone then. Raises RuntimeError after a while."""
        value = self.see(name)
        dist.distributed_c10d._get_default_store().delete_key(name)
        return value

    def has(self, name: str) -> bool:
        """Whether something is there for :meth:`take`, which would keep other threads from the store while it waits."""
        return dist.distributed_c10d._get_default_store().check([name])

    def see(self, name: str) -> str:
        """What a rank has put there for several to see, waiting for it."""
        store = dist.distributed_c10d._get_default_store()
        store.wait([name], datetime.timedelta(seconds=COLLECTIVE))
        return bytes(store.get(name)).decode()

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()
