"""The process that replicas are forked from. Importing this module imports neither torch nor transformers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext

_IMPORTS = ["outrider.server.torch_engine.replica", "transformers.models.auto.modeling_auto"]


def replica_context() -> ForkServerContext:
    """Replicas are forked from a process that has imported what they need and done nothing else: a new one is ready
    as soon as its model is loaded."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def prepare() -> None:
    """Start that process now: it imports what it needs while this one does."""
    replica_context()
    with signals_waiting():
        forkserver.ensure_running()


@contextmanager
def signals_waiting() -> Iterator[None]:
    """Ctrl-C, and whoever stops a service, signal all processes of a group. When replicas end is for the front to say:
    they, and the process they are forked from, inherit that these signals wait."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
