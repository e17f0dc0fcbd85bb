"""What rank 0 tells the other ranks: each of these is something that all of them do together."""

import msgspec

from outrider.contract.feed import Batch
from outrider.contract.manifest import DTypeName


class Load(msgspec.Struct, tag="load"):
    """Load the model, or what the checkpoint holds. run_id: of the run, in the names of segments."""

    run_id: str
    checkpoint: str | None


class Open(msgspec.Struct, tag="open"):
    """Get ready to publish, in this precision, and publish ``version``. segment_url: under which rank 0's host serves
    segments, None where all servers are on it. server_url, key: for other hosts, to find out under which address they
    are reached, and whom to serve."""

    version: int
    serving_dtype: DTypeName
    segment_url: str | None
    server_url: str
    key: str


class Step(msgspec.Struct, tag="step"):
    """Train on a batch, and publish the weights as ``version``."""

    batch: Batch
    learning_rate: float
    version: int


class Gather(msgspec.Struct, tag="gather"):
    """Bring the whole weights to rank 0, and the optimizer's state with them where a checkpoint needs it."""

    optimizer: bool


class End(msgspec.Struct, tag="end"):
    """The run has ended, with this exit status on all ranks."""

    status: int


Order = Load | Open | Step | Gather | End
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Order).decode
