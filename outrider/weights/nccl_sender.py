"""A process that holds published weights and broadcasts them to a vLLM server by NCCL, with vLLM's own functions.

It is a process of its own because an NCCL call that a peer does not answer never returns: this one can be killed, and
neither the trainer nor the collector hangs with it. It reads orders from its standard input and answers each of them
on its standard output, in JSON, a line each; see :mod:`outrider.weights.nccl_orders`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from outrider.contract.keys import client_key
from outrider.contract.lifetime import die_with_parent
from outrider.contract.manifest import Manifest
from outrider.weights.buffers import BufferLayout, HostBuffer, pin
from outrider.weights.fetch import fetch_tensors
from outrider.weights.nccl_orders import Connect, Done, Load, Order, Prepare, Send


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
    sender.close()
    return 0


class Sender:
    """The group with a server's workers, and the version that they get next."""

    def __init__(self, key: str) -> None:
        """key: for weights that lie on other hosts."""
        self._key = key
        self._group: Any = None
        self._buffer: HostBuffer | None = None
        self._layout: BufferLayout | None = None
        self._tensors: dict[str, Tensor] = {}

    def obey(self, order: Order) -> None:
        """Raises whatever goes wrong."""
        match order:
            case Prepare():
                prepare()
            case Connect():
                self._group = connector()(order.address, order.port, order.world_size)
                if self._group.disabled:
                    raise RuntimeError("vLLM could not load NCCL on this host")
            case Load(manifest=manifest):
                self._load(manifest)
            case Send():
                self._send(order.packed_buffer_bytes, order.packed_buffers)

    def close(self) -> None:
        """Let the memory go."""
        self._tensors = {}
        if self._buffer is not None:
            self._buffer.close()

    def _load(self, manifest: Manifest) -> None:
        shapes = {entry.name: entry.shape for entry in manifest.tensors}
        dtype = getattr(torch, manifest.tensors[0].dtype)
        if self._layout is None or (self._layout.shapes, self._layout.dtype) != (shapes, dtype):
            self.close()
            self._layout = BufferLayout(shapes, dtype)
            self._buffer = HostBuffer(self._layout.length)
            if torch.cuda.is_available():
                pin(torch.frombuffer(self._buffer.memory, dtype=torch.uint8))
            self._tensors = self._layout.tensors(self._buffer)
        fetch_tensors(manifest, self._tensors, self._key)
        # In the order in which receivers expect them.
        self._tensors = {entry.name: self._tensors[entry.name] for entry in manifest.tensors}

    def _send(self, buffer_bytes: int, buffers: int) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

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
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # older ones return before the last broadcast has ended
            torch.cuda.empty_cache()  # the GPU is the trainer's


def prepare() -> None:
    """Import what sending takes. Raises RuntimeError where it cannot be had."""
    try:
        from vllm.plugins import load_general_plugins
    except ImportError:
        raise RuntimeError("vLLM must be installed beside the trainer, too: its own functions send") from None
    load_general_plugins()
    connector()
    from vllm.distributed.weight_transfer import packed_tensor  # noqa: F401


def connector() -> Callable[[str, int, int], Any]:
    """``connect(address, port, world_size)``: vLLM's communicator, as rank 0 of it, when all workers have joined."""
    try:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
    except ImportError:  # before 0.28
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        return lambda address, port, size: NCCLWeightTransferEngine.trainer_init(
            {"master_address": address, "master_port": port, "world_size": size}
        )
    return lambda address, port, size: stateless_init_process_group(address, port, 0, size, device=0)


if __name__ == "__main__":
    sys.exit(main())
