"""Three ranks, each a process: what the others make of one that ends. A host that vanishes is in test_nodes.py."""

import socket
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore


def outcomes(*deeds: str, silence: float = 5) -> list[tuple[int, str, str]]:
    """Exit status and words of each rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.heartbeat_child", str(rank), str(store.port), deed, str(silence)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, deed in enumerate(deeds)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def test_a_rank_that_dies_is_named_by_all() -> None:
    first, second, third = outcomes("wait", "wait", "die")
    assert third[0] == -9
    for rank, (status, out, err) in enumerate((first, second)):
        assert (status, out) == (1, "last words\n")
        assert f"outrider: rank {rank} on node {rank} ends: rank 2 on node 2 (host2) is gone" in err


def test_rank_0_dies() -> None:
    _, *others = outcomes("die", "wait", "wait")
    for status, _, err in others:
        assert status == 1
        assert "rank 0 on node 0 (127.0.0.1) is gone" in err


def test_a_rank_that_fails_says_why_everywhere() -> None:
    first, second, third = outcomes("wait", "fail", "wait")
    assert second[0] == 2
    for status, _, err in (first, third):
        assert status == 1
        assert "rank 1 on node 1 (host1) has ended: no memory is left" in err


def test_who_leaves_or_computes_is_no_loss() -> None:
    """The ranks compute for twice the time of silence, and hold Python's lock all the while."""
    assert [status for status, _, _ in outcomes("compute", "leave", "compute")] == [0, 0, 0]


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\n", b'{"type":"hello","token":"another","rank":1,"node":1,"host":"h"}\n']
)
def test_strangers_are_no_ranks(words: bytes) -> None:
    from outrider.trainer.heartbeat import Heartbeat, Hello

    heartbeat = Heartbeat(Hello("token", 0, 0, "host0"), 5)
    with socket.create_connection(("127.0.0.1", heartbeat.listen("127.0.0.1"))) as stranger:
        stranger.sendall(words)
        stranger.settimeout(10)
        assert stranger.recv(1) == b""  # it is shown out
    time.sleep(0.1)
    heartbeat.leave()  # and nobody has ended for it
