"""Starting the ranks of this node, with torchrun's own launcher.

Its ranks are in sessions of their own, and it ends them 30 seconds after Ctrl-C, in the middle of a step; so signals do
not reach it here: they are handed on to the ranks, of which the first finishes its step, saves, and ends the run.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from outrider.cli.gpus import visible_gpus
from outrider.cli.muster import muster
from outrider.cli.placement import Placement
from outrider.contract.errors import UserError
from outrider.contract.lifetime import end_now
from outrider.contract.output import say
from outrider.contract.signals import hear_at_once
from outrider.weights.segments import remove_stale_segments

#: Seconds for torch's own rendezvous, when all nodes have met.
RENDEZVOUS = 120


def launch(placement: Placement, command: list[str]) -> int:
    """Run ``command``, a module and its arguments, as ranks; the exit status of the first of them that failed, or 0.
    Raises UserError when the other nodes do not come."""
    # In a container this may be process 1, which the kernel spares what it has no handler for.
    signal.signal(signal.SIGTERM, _stop)
    check_gpus(placement)
    if placement.nodes > 1:
        muster(placement)
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from outrider.trainer.meeting import leave_word

    config = LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.processes,
        run_id="outrider",
        rdzv_backend="static",
        rdzv_endpoint=f"{placement.address}:{placement.port or _free_port()}",
        rdzv_configs={"rank": placement.node, "timeout": RENDEZVOUS},
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says of failures is said below
    signals = Signals()
    try:
        elastic_launch(config, sys.executable)("-m", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        died = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        ended = f"rank {rank} on node {placement.node} ended with {died}"
        if placement.node > 0:  # node 0 keeps the store, which ends with it
            leave_word(placement.address, placement.port, ended)
        if failure.exitcode in (2, 130):  # it has said what there is to say
            return int(failure.exitcode)
        if signals.last is not None and failure.exitcode in (-signals.last, -signal.SIGTERM):
            return 128 + signals.last
        text = f"{ended}, and the run with it; go on with --resume_from_checkpoint auto"
        if failure.exitcode == 1:  # it has said why
            print(f"outrider: {text}", file=sys.stderr)
            return 1
        raise UserError(text) from None
    except (DistStoreError, DistNetworkError, TimeoutError) as error:
        raise UserError(
            f"node {placement.node} of {placement.nodes} could not join the others at {placement.address}:"
            f"{placement.port} within {RENDEZVOUS} s, though all had met there: has one of them ended since? "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        remove_stale_segments()  # of ranks that were killed
    return 0


def check_gpus(placement: Placement) -> None:
    """Raises UserError where processes would have to share GPUs, before other nodes begin to wait for them."""
    if 0 < (shown := visible_gpus(os.environ)) < placement.processes:
        raise UserError(
            f"NPROC_PER_NODE={placement.processes}: {shown} GPUs are shown here, and each process needs its own; start "
            "as many processes, or show more GPUs (CUDA_VISIBLE_DEVICES)"
        )


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class Signals:
    """Hands signals on to the ranks."""

    def __init__(self) -> None:
        #: The last signal.
        self.last: int | None = None
        hear_at_once((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._hand_on)

    def _hand_on(self, number: int) -> None:
        """To the first rank, where it is on this node; else to all, which ask the first one to end the run."""
        ranks = _ranks()
        self.last, leads = number, "0" in ranks
        if not ranks:
            end_now(lambda: say("outrider: stopped before the run had begun"), 128 + number)
        for pid in [ranks["0"]] if leads else ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number if number == signal.SIGINT and leads else signal.SIGTERM)


def _ranks() -> dict[str, int]:
    """Process ids of the children by their rank."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread, or a child, that ends at this moment
            for pid in (task / "children").read_text().split():
                for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[variable.removeprefix(b"RANK=").decode()] = int(pid)
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
