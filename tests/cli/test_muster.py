"""Nodes that meet, and those that do not: each in a thread of its own, as if on hosts of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from outrider.cli.muster import muster
from outrider.cli.placement import Placement
from outrider.contract.errors import UserError


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def node(number: int, port: int, nodes: int = 2, processes: int = 1, address: str = "127.0.0.1") -> Placement:
    return Placement(nodes * processes, True, nodes, number, processes, address, port)


def met(*placements: Placement, deadline: float = 20.0) -> list[str | None]:
    """What each of them is told; None where it may go."""
    with ThreadPoolExecutor(len(placements)) as pool:
        futures: list[Future[None]] = []
        for placement in placements:
            futures.append(pool.submit(muster, placement, deadline))
            time.sleep(0.3)  # in this order
        errors = [future.exception() for future in futures]
    assert all(error is None or isinstance(error, UserError) for error in errors), errors
    return [None if error is None else str(error) for error in errors]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_come(order: tuple[int, ...]) -> None:
    port = free_port()
    assert met(*(node(number, port, nodes=3) for number in order)) == [None] * 3
    with socket.create_server(("127.0.0.1", port)):  # and the port is free for whoever comes next
        pass


def test_two_nodes_with_one_number() -> None:
    port = free_port()
    said = met(node(0, port, nodes=3), node(1, port, nodes=3), node(1, port, nodes=3))
    name = socket.gethostname()
    assert all(f"NODE_RANK=1 was given to {name} and to {name}: give each node its own" in str(text) for text in said)


def test_another_number_of_nodes() -> None:
    port = free_port()
    for said in met(node(0, port), node(1, port, nodes=4)):
        assert "NNODES=4 on node 1 (" in str(said)
        assert "NNODES=2 on node 0 (" in str(said)


def test_another_number_of_processes() -> None:
    port = free_port()
    for said in met(node(0, port, processes=8), node(1, port, processes=4)):
        assert "has 4 processes and node 0" in str(said)
        assert "set the same NPROC_PER_NODE on all nodes" in str(said)


def test_a_second_node_0_on_one_host() -> None:
    port = free_port()
    first, second = met(node(0, port), node(0, port), deadline=2.0)
    assert "waits at 127.0.0.1" in str(first)
    assert f"node 0 cannot listen on MASTER_PORT={port}" in str(second)


def test_a_node_that_does_not_come() -> None:
    port = free_port()
    for number, said in enumerate(met(node(0, port, nodes=4), node(1, port, nodes=4), deadline=2.0)):
        assert f"node {number} of 4 (" in str(said)
        # A node that tries for the first time when node 0 has given up finds nobody.
        reasons = "for nodes 2, 3: it did not come within 2 s", "it closed the connection", "Connection refused"
        assert any(reason in str(said) for reason in reasons)


@pytest.mark.parametrize(
    ("address", "problem"),
    [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "Name or service not known|Temporary failure")],
)
def test_nobody_is_there(address: str, problem: str) -> None:
    [said] = met(node(1, free_port(), address=address), deadline=1.0)
    assert f"waits for node 0 at {address}" in str(said)
    assert any(one in str(said) for one in problem.split("|"))


def test_something_else_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        port = other.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(met, node(1, port), deadline=1.5)
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\n")
            [said] = waiting.result()
            connection.close()
    assert "(something else answers there" in str(said) or "it does not answer" in str(said)


def test_strangers_and_those_who_leave_are_no_nodes() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(muster, node(0, port, nodes=3), 20.0)
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
        early = pool.submit(muster, node(1, port, nodes=3), 0.5)
        assert isinstance(early.exception(), UserError)
        others = [pool.submit(muster, node(number, port, nodes=3), 20.0) for number in (1, 2)]
        assert [future.exception() for future in (first, *others)] == [None] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    environment = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "outrider.cli.main", "train", "--model", "m", "--dataset", "d.jsonl",
               "--reward_funcs", "accuracy"]  # fmt: skip
    running = subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # in the background of a shell Ctrl-C is ignored
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:  # until it listens
        try:
            socket.create_connection(("127.0.0.1", int(environment["MASTER_PORT"])), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate(timeout=10)
    assert running.returncode in (130, 143)
    assert "Traceback" not in said
