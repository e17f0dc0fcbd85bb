"""What the process that sends weights by NCCL is told, and what it answers."""

import msgspec

from outrider.contract.manifest import Manifest


class Prepare(msgspec.Struct, tag="prepare"):
    """Find out whether it can send at all, before anybody waits for it."""


class Connect(msgspec.Struct, tag="connect"):
    """Open a group of ``world_size`` ranks at ``address:port``, of which it is rank 0."""

    address: str
    port: int
    world_size: int


class Load(msgspec.Struct, tag="load"):
    """Hold this version ready, and verify it."""

    manifest: Manifest


class Send(msgspec.Struct, tag="send"):
    """Broadcast it, packed into buffers of so many bytes, as many at a time as receivers use."""

    packed_buffer_bytes: int
    packed_buffers: int


Order = Prepare | Connect | Load | Send


class Done(msgspec.Struct):
    """An order has been carried out, or has failed."""

    error: str | None = None
