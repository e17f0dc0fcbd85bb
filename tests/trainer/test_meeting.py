"""Ranks of several nodes in one store; as processes they are in test_launch.py."""

import socket
import threading

import pytest
from torch.distributed import TCPStore

from outrider.contract.errors import UserError
from outrider.trainer import meeting
from outrider.trainer.meeting import Meeting, leave_word


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    return kept


def test_all_come(store: TCPStore) -> None:
    found: list[int] = []

    def rank(number: int) -> None:
        me = Meeting(number, 2)
        me.come()
        me.wait_for_first()
        me.wait_for_all(4)
        found.append(number)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (4, "rank 1 on node 0, rank 2 on node 1, rank 3 on node 1"),
        (8, "rank 1 on node 0, rank 2 on node 1, rank 3 on node 1, rank 4 on node 2 and 3 more"),
    ],
)
def test_who_is_missing_is_named(
    store: TCPStore, size: int, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0.1)
    monkeypatch.setattr(meeting, "DEADLINE", 1.0)
    me = Meeting(0, 2)
    me.come()
    with pytest.raises(UserError, match=f"^rank 0 on node 0 has waited 1 s for {named}, which should"):
        me.wait_for_all(size)
    assert capsys.readouterr().err == f"outrider: rank 0 on node 0 waits for {named}, up to 1 s\n"


def test_one_that_has_ended_is_not_waited_for(store: TCPStore) -> None:
    me = Meeting(0, 1)
    leave_word("127.0.0.1", store.port, "rank 1 on node 1 ended with status 1")
    with pytest.raises(UserError, match="rank 1 on node 1 ended with status 1; its"):
        me.wait_for_first()


def test_node_0_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(nobody))
    with pytest.raises(UserError, match="rank 3 on node 1 cannot reach node 0, which was there"):
        Meeting(3, 2)
    leave_word("127.0.0.1", nobody, "nobody hears it")
