"""What rank 0 tells the other ranks: each of these is something that all of them do together."""

import msgspec

from outrider.contract.feed import MiniBatch
from outrider.contract.manifest import DTypeName


class Load(msgspec.Struct, tag="load"):
    """Load the model, or what the checkpoint holds. run_id: of the run, in the names of segments."""

    run_id: str
    checkpoint: str | None


class Open(msgspec.Struct, tag="open"):
    """Get ready to publish, in this precision. segment_url: under which rank 0's host serves
    segments, None where all servers are on it. server_url, key: for other hosts, to find out under which address they
    are reached, and whom to serve."""

    serving_dtype: DTypeName
    segment_url: str | None
    server_url: str
    key: str


class Take(msgspec.Struct, tag="take"):
    """Get ready for optimizer steps on these mini-batches."""

    mini_batches: list[MiniBatch]


class Step(msgspec.Struct, tag="step"):
    """Take an optimizer step on one of the mini-batches that were taken last."""

    mini_batch: int
    learning_rate: float


class Publish(msgspec.Struct, tag="publish"):
    """Publish the weights as ``version``."""

    version: int


class Save(msgspec.Struct, tag="save"):
    """Start to save the checkpoint after ``step``: copy and write one's own rows, and report under ``number``."""

    step: int
    number: int


class Gather(msgspec.Struct, tag="gather"):
    """Bring the whole weights to rank 0, tensor by tensor."""


class End(msgspec.Struct, tag="end"):
    """The run has ended, with this exit status on all ranks."""

    status: int


Order = Load | Open | Take | Step | Publish | Save | Gather | End
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Order).decode
