"""A process that holds published weights and broadcasts them to a vLLM server by NCCL, with vLLM's own functions.

It is a process of its own because an NCCL call that a peer does not answer never returns: this one can be killed, and
neither the trainer nor the collector hangs with it. It reads orders from its standard input and answers each of them
on its standard output, in JSON, a line each; see :mod:`outrider.weights.nccl_orders`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from outrider.contract.keys import client_key
from outrider.contract.lifetime import die_with_parent
from outrider.contract.manifest import Manifest
from outrider.weights.fetch import fetch_tensors
from outrider.weights.nccl_orders import Connect, Done, Load, Order, Send


def main() -> int:
    """Until the standard input ends."""
    die_with_parent()
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    decode, encode = msgspec.json.Decoder(Order).decode, msgspec.json.Encoder().encode
    sender = Sender(client_key(None))
    for line in orders:
        error = None
        try:
            sender.obey(decode(line))
        except Exception as problem:  # noqa: BLE001 - whoever gave the order must hear it, whatever it is
            error = f"{type(problem).__name__}: {problem}"
        answers.write(encode(Done(error=error)) + b"\n")
        answers.flush()
    return 0


class Sender:
    """The group with a server's workers, and the version that they get next."""

    def __init__(self, key: str) -> None:
        """key: for weights that lie on other hosts."""
        self._key = key
        self._group: Any = None
        self._tensors: dict[str, Tensor] = {}

    def obey(self, order: Order) -> None:
        """Raises whatever goes wrong."""
        match order:
            case Connect():
                self._group = connect(order)
                if self._group.disabled:
                    raise RuntimeError("vLLM could not load NCCL on this host")
            case Load(manifest=manifest):
                self._load(manifest)
            case Send():
                self._send(order.packed_buffer_bytes, order.packed_buffers)

    def _load(self, manifest: Manifest) -> None:
        wanted = {entry.name: (entry.shape, getattr(torch, entry.dtype)) for entry in manifest.tensors}
        have = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        if wanted != have:
            pinned = torch.cuda.is_available()
            self._tensors = {
                name: torch.empty(shape, dtype=dtype, pin_memory=pinned) for name, (shape, dtype) in wanted.items()
            }
        fetch_tensors(manifest, self._tensors, self._key)

    def _send(self, buffer_bytes: int, buffers: int) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import packed_nccl_broadcast_producer

        device = torch.accelerator.current_accelerator() or torch.device("cpu")

        def on_device() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._tensors.items():
                yield name, tensor.to(device, non_blocking=True)

        packed_nccl_broadcast_producer(
            iterator=on_device(),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=buffer_bytes,
            num_buffers=buffers,
        )


def connect(order: Connect) -> Any:
    """vLLM's communicator, as rank 0 of it. Returns when all workers have joined, or raises."""
    try:
        from vllm.plugins import load_general_plugins
    except ImportError:
        raise RuntimeError("vLLM must be installed beside the trainer, too: its own functions send") from None

    load_general_plugins()
    with contextlib.suppress(ImportError):  # where vLLM has it from 0.25 on
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        return stateless_init_process_group(order.address, order.port, 0, order.world_size, device=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    info = {"master_address": order.address, "master_port": order.port, "world_size": order.world_size}
    return NCCLWeightTransferEngine.trainer_init(info)


if __name__ == "__main__":
    sys.exit(main())
