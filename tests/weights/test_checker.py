"""The process that verifies versions for a server."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from outrider.contract.manifest import Manifest
from outrider.weights.checker import Checker
from outrider.weights.checksums import FetchError
from outrider.weights.publish import Publisher


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher({"a": torch.arange(1000.0), "b": torch.ones(7)}, "float32", "run", "model", None)
    yield made
    made.close()


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker()
    yield made
    made.close()


def spoil(manifest: Manifest, tensor: int) -> None:
    """Write over a byte of it."""
    piece = manifest.tensors[tensor].pieces[0]
    with open(manifest.segments[piece.segment].path, "r+b") as file:
        file.seek(piece.offset)
        file.write(b"\xaa")


def test_right_bytes_pass_and_others_are_named(publisher: Publisher, checker: Checker) -> None:
    first, second = (publisher.publish(version).result() for version in (1, 2))
    for manifest in (first, second, first):  # mapped once, read anew each time
        checker.check(manifest)
    spoil(second, 1)
    checker.check(first)
    with pytest.raises(FetchError, match=r"tensor 'b'.*checksum"):
        checker.check(second)
    checker.check(first)


def test_a_segment_that_is_gone(publisher: Publisher, checker: Checker) -> None:
    manifest = publisher.publish(1).result()
    Path(manifest.segments[0].path).unlink()
    with pytest.raises(FetchError, match="No such file"):
        checker.check(manifest)


def test_another_takes_the_place_of_one_that_has_died(publisher: Publisher, checker: Checker) -> None:
    manifest = publisher.publish(1).result()
    checker.check(manifest)
    os.kill(checker._process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (checker._process.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(FetchError, match="ended with status -9; another one"):
        checker.check(manifest)
    killer.join()
    checker.check(manifest)


def test_one_that_stands_still_is_given_up(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a manifest that no pipe would hold."""
    monkeypatch.setattr("outrider.weights.checker.DEADLINE", 0.5)
    manifest = publisher.publish(1).result()
    checker = Checker()
    os.kill(checker._process.pid, signal.SIGSTOP)
    with pytest.raises(FetchError, match=r"gave no answer within 0\.5 s"):
        checker.check(msgspec.structs.replace(manifest, tensors=manifest.tensors * 4000))
    checker.close()


ASKS_AND_IS_KILLED = """
import os, signal
from outrider.contract.manifest import Manifest
from outrider.weights.checker import Checker
checker = Checker()
checker.check(Manifest(run_id="run", version=1, model_fingerprint="model", segments=(), tensors=()))
print(checker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_whoever_asks() -> None:
    asked = subprocess.run([sys.executable, "-c", ASKS_AND_IS_KILLED], capture_output=True, text=True, timeout=60)
    assert asked.returncode == -signal.SIGKILL, asked.stderr
    until = time.monotonic() + 10
    while Path(f"/proc/{int(asked.stdout)}").exists():
        assert time.monotonic() < until, "it goes on alone"
        time.sleep(0.02)
