"""A plugin for vLLM that puts a TCP store in the place of NCCL, which needs GPUs: the rest of its weight transfer, both
sides of it, is then tried on a CPU."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: Names a file; while it exists, broadcasts raise on the side of the sender, or stand still on that of the workers.
SENDER_FAILS, WORKERS_STALL = "OUTRIDER_TEST_SENDER_FAILS", "OUTRIDER_TEST_WORKERS_STALL"


class Group:
    """What is used of a ``PyNcclCommunicator``."""

    disabled = False

    def __init__(self, store: Any) -> None:
        self._store = store

    def destroy(self) -> None:
        """There is nothing to let go of."""

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        _obey_files(self._store.rank == src)
        received = self._store.broadcast_obj(tensor if self._store.rank == src else None, src)
        tensor.copy_(received)


def _obey_files(sends: bool) -> None:
    if sends and os.path.exists(os.environ.get(SENDER_FAILS, "")):
        raise RuntimeError("the network is down")
    while not sends and os.path.exists(os.environ.get(WORKERS_STALL, "")):
        time.sleep(0.05)


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor

    def join(address: str, port: int, rank: int, world_size: int, device: object) -> Group:
        return Group(StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world_size))

    def worker_join(info: Any, parallel: Any) -> Group:
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + info.rank_offset
        return join(info.master_address, info.master_port, rank, info.world_size, None)

    def produce(iterator: Iterator[tuple[str, torch.Tensor]], group: Group, **_: object) -> None:
        for _name, tensor in iterator:
            group.broadcast(tensor, 0)

    def consume(
        iterator: Iterator[Any], group: Group, post_unpack_func: Callable[[list[Any]], None], **_: object
    ) -> None:
        for name, (shape, dtype) in iterator:
            tensor = torch.empty(shape, dtype=dtype)
            group.broadcast(tensor, 0)
            post_unpack_func([(name, tensor)])

    nccl_common.stateless_init_process_group = join
    nccl_engine.worker_init_process_group = worker_join
    packed_tensor.packed_nccl_broadcast_producer = produce
    nccl_engine.packed_nccl_broadcast_consumer = consume
