"""Two trainer nodes and a server, each on a host of its own: what loopback cannot show. Needs network namespaces."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.demo.task import problems, write_jsonl
from tests.contract.servers import command, environment
from tests.server.models import DEMO_MODEL
from tests.trainer.hosts import Simulated, simulated_hosts, why_not

KEY = "a key for tests"
DEADLINE = 300.0

_REASON = why_not()
pytestmark = [
    pytest.mark.runs,
    pytest.mark.skipif(_REASON is not None, reason=f"no network namespaces: {_REASON}"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Simulated]]:
    """Node 0, node 1, and the host of a server that is ready."""
    with simulated_hosts(3) as made:
        log = tmp_path_factory.mktemp("server") / "log"
        arguments = command(DEMO_MODEL, "--threads", "1", "--host", made[2].address, "--port", "8000")
        with log.open("wb") as file:
            server = subprocess.Popen(
                made[2].command(*arguments), stdout=file, stderr=subprocess.STDOUT, env=environment(KEY)
            )
        deadline = time.monotonic() + DEADLINE
        while "ready: " not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield made
        server.kill()  # it may still wait for weights from the node that was cut off
        server.wait(60)


def start(hosts: list[Simulated], node: int, directory: Path, rate: float = 5e-4) -> "subprocess.Popen[str]":
    """The trainer of one node: 128 rollouts a step."""
    if not (directory / "train.jsonl").exists():
        write_jsonl(directory / "train.jsonl", problems("train", 3000, 0))
        write_jsonl(directory / "heldout.jsonl", problems("heldout", 100, 0))
    settings = {
        "model": DEMO_MODEL, "vllm_server_host": hosts[2].address, "vllm_server_port": 8000,
        "dataset": directory / "train.jsonl", "val_dataset": directory / "heldout.jsonl", "reward_funcs": "accuracy",
        "num_generations": 8, "per_device_train_batch_size": 64, "max_completion_length": 8, "temperature": 1.0,
        "max_staleness": 1, "beta": 0, "learning_rate": rate, "lr_scheduler_type": "constant",
        "max_steps": 4000, "eval_steps": 24, "save_steps": 0, "threads": 1, "output_dir": directory / "run",
        "vllm_server_api_key": KEY, "heartbeat_timeout": 6,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    placement = {
        "NNODES": "2", "NODE_RANK": str(node), "NPROC_PER_NODE": "1", "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": "29500",
    }  # fmt: skip
    return subprocess.Popen(
        hosts[node].command(sys.executable, "-m", "outrider.cli.main", "train", *words),
        env={**os.environ, **placement}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def evaluations(directory: Path) -> list[float]:
    """Held-out rewards so far."""
    path = directory / "run" / "metrics.jsonl"
    # The last line may be half written.
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row["reward"] for row in map(json.loads, rows) if "learning_rate" not in row]


def has_spoken_to(process: "subprocess.Popen[str]", port: int) -> bool:
    """Whether its host has, or had within the last minute, a connection to ``port`` elsewhere."""
    tables = [Path(f"/proc/{process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    remote = [line.split()[2] for table in tables for line in table.splitlines()[1:]]
    return any(int(place.rpartition(":")[2], 16) == port for place in remote)


def test_a_node_with_another_parameter_is_refused_by_name(hosts: list[Simulated], tmp_path: Path) -> None:
    first, second = start(hosts, 0, tmp_path), start(hosts, 1, tmp_path, rate=1e-3)
    for process in (first, second):
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == 2
        assert "--learning_rate is 0.001 on node 1 (rank 1) and 0.0005 on node 0 (rank 0): start all nodes" in said


def test_a_node_that_the_server_does_not_reach_is_named(hosts: list[Simulated], tmp_path: Path) -> None:
    """Requests come to the server, and it does not get to the weights of node 1."""
    with hosts[2].without(hosts[1]):
        first, second = (start(hosts, node, tmp_path) for node in (0, 1))
        _, said = first.communicate(timeout=DEADLINE)
        _, said_there = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (2, 2)
    server = f"http://{hosts[2].address}:8000"
    assert f"server {server} cannot fetch weights from node 1 of the trainer ({hosts[1].name}) at http://" in said
    assert "No route to host" in said
    assert "the run has ended; node 0 says why" in said_there


def test_the_demo_learns_until_a_link_is_cut(hosts: list[Simulated], tmp_path: Path) -> None:
    """Weights travel from both nodes to the server by HTTP: it shares no memory with them, and only node 0 has to do
    with its port. No connection is closed by the cut: the other side is silent. Last, since the link stays down."""
    first, second = (start(hosts, node, tmp_path) for node in (0, 1))
    deadline = time.monotonic() + DEADLINE
    while len(found := evaluations(tmp_path)) < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert found[1] >= found[0] + 0.2
    assert has_spoken_to(first, 8000)
    assert not has_spoken_to(second, 8000)
    hosts[1].cut()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1
    assert f"rank 1 on node 1 ({hosts[1].name}) has not been heard for 6 s" in said
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"rank 0 on node 0 ({hosts[0].address}) has not been heard for 6 s" in said
