"""Runs of several processes, started as a user starts them: NPROC_PER_NODE and NNODES in the environment."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from outrider.demo.task import problems, write_jsonl
from outrider.trainer.summary import Summary
from outrider.weights.segments import segment_directory
from tests.contract.servers import Server, start_torch
from tests.end_to_end.processes import descendants_of, ranks_of
from tests.server.models import DEMO_MODEL

pytestmark = pytest.mark.runs

KEY = "a key for tests"
DEADLINE = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = start_torch(DEMO_MODEL, tmp_path_factory.mktemp("server"), key=KEY)
    yield started
    started.kill()


def start(
    server: Server, directory: Path, *flags: str, nodes: int = 1, node: int = 0, processes: int = 2, steps: int = 6,
    rate: float = 5e-4, port: int = 0, peers: int = 1, command: str = "outrider.cli.main train",
) -> "subprocess.Popen[str]":  # fmt: skip
    """A trainer of 128 rollouts a step."""
    if not (directory / "train.jsonl").exists():
        write_jsonl(directory / "train.jsonl", problems("train", 3000, 0))
        write_jsonl(directory / "heldout.jsonl", problems("heldout", 100, 0))
    settings = {
        "model": DEMO_MODEL, "vllm_server_port": server.port, "dataset": directory / "train.jsonl",
        "val_dataset": directory / "heldout.jsonl", "reward_funcs": "accuracy", "num_generations": 8,
        "per_device_train_batch_size": 128 * peers // (nodes * processes), "tensor_parallel_size": peers,
        "max_completion_length": 8, "temperature": 1.0,
        "max_staleness": 1, "beta": 0, "learning_rate": rate, "lr_scheduler_type": "constant", "max_steps": steps,
        "save_steps": 2, "threads": 1, "output_dir": directory / "run", "vllm_server_api_key": KEY,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    placement = {"NPROC_PER_NODE": str(processes)}
    if nodes > 1:
        placement |= {
            "NNODES": str(nodes),
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return subprocess.Popen(
        [sys.executable, "-m", *command.split(), *words, *flags],
        env={**os.environ, **placement}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rows(directory: Path) -> list[dict[str, object]]:
    path = directory / "run" / "metrics.jsonl"
    # The last line may be half written.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_a_run_goes_on_with_another_number_of_processes(server: Server, tmp_path: Path) -> None:
    """Two learn, one of them is killed, and four go on where they were; then four of which two compute layers together,
    and one alone."""
    running = start(server, tmp_path, steps=400)
    deadline = time.monotonic() + DEADLINE
    while len(rows(tmp_path)) < 5:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    ranks = ranks_of(running.pid)
    os.kill(ranks["1"], signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "rank 1 on node 0 ended with signal 9, and the run with it" in said
    assert not [path for pid in ranks.values() for path in segment_directory().glob(f"outrider-*-{pid}-*")]
    for processes, peers, steps in ((4, 1, 8), (4, 2, 10), (1, 1, 12)):
        output, said = start(
            server, tmp_path, "--resume_from_checkpoint", "auto", processes=processes, peers=peers, steps=steps
        ).communicate(timeout=DEADLINE)
        assert "resumed from" in output, said
        summary = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes(), type=Summary)
        assert (summary.finished, summary.steps) == (True, steps)
        assert summary.max_staleness_seen <= 1
    assert (summary.reward_after or 0) >= 0.5


def test_the_command_of_ms_swift_starts_several_processes(server: Server, tmp_path: Path) -> None:
    command = "outrider.cli.swift rlhf --rlhf_type grpo --deepspeed zero3"
    _, said = start(server, tmp_path, command=command, steps=2).communicate(timeout=DEADLINE)
    summary = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes(), type=Summary)
    assert (summary.finished, summary.steps) == (True, 2)
    assert [line.split(":")[:2] for line in said.splitlines()] == [
        ["swift", " --deepspeed zero3 is not used"],
        ["swift", " --train_type is not given"],
    ]


@pytest.mark.parametrize(
    ("told", "sharded"),
    [("both", ("--shard_across_nodes", "false")), ("the second", ("--fsdp_cpu_offload", "true"))],
)
def test_two_nodes_train_together_until_they_are_told_to_stop(
    server: Server, tmp_path: Path, told: str, sharded: tuple[str, ...]
) -> None:
    """As clusters do it: SIGTERM for every node at once, or for the one that is to be emptied; in the middle of a batch
    with four optimizer steps. Each node has a copy of the model, or a half of the one."""
    port, flags = free_port(), ("--steps_per_generation", "2", "--num_iterations", "2", *sharded)
    second = start(server, tmp_path, *flags, nodes=2, node=1, processes=1, port=port, steps=400)
    first = start(server, tmp_path, *flags, nodes=2, node=0, processes=1, port=port, steps=400)
    deadline = time.monotonic() + DEADLINE
    while len(rows(tmp_path)) < 4:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    if told == "both":
        first.send_signal(signal.SIGTERM)
    output, said = first.communicate(timeout=DEADLINE)
    assert first.returncode == 130, said
    assert "go on with the same command and --resume_from_checkpoint auto" in output
    assert second.wait(60) == 130
    summary = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes(), type=Summary)
    assert not summary.finished
    assert [row["version"] for row in rows(tmp_path) if row["kind"] == "step"][:4] == [0, 0, 0, 0]
    assert (tmp_path / "run" / f"checkpoint-{summary.steps}").is_dir()


def test_a_node_with_another_parameter_is_named(server: Server, tmp_path: Path) -> None:
    port = free_port()
    second = start(server, tmp_path, nodes=2, node=1, processes=1, rate=1e-3, port=port)
    first = start(server, tmp_path, nodes=2, node=0, processes=1, port=port)
    for process in (first, second):
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == 2
        assert "--learning_rate is 0.001 on node 1 (rank 1) and 0.0005 on node 0 (rank 0): start all nodes" in said


def test_a_node_that_shares_otherwise_is_named(server: Server, tmp_path: Path) -> None:
    """Before anything is made that depends on it, in which one would wait for the other."""
    port = free_port()
    second = start(server, tmp_path, "--shard_across_nodes", "false", nodes=2, node=1, processes=1, port=port)
    first = start(server, tmp_path, nodes=2, node=0, processes=1, port=port)
    for process in (first, second):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "--shard_across_nodes is False on node 1 (rank 1) and True on node 0 (rank 0): start all nodes" in said


def test_a_rank_that_is_killed_on_another_node_is_named(server: Server, tmp_path: Path) -> None:
    port = free_port()
    second = start(server, tmp_path, nodes=2, node=1, processes=1, port=port, steps=400)
    first = start(server, tmp_path, nodes=2, node=0, processes=1, port=port, steps=400)
    deadline = time.monotonic() + DEADLINE
    while len(rows(tmp_path)) < 4:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks_of(second.pid)["1"], signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "rank 0 on node 0 ends: rank 1 on node 1" in said
    _, said = second.communicate(timeout=60)
    assert "rank 1 on node 1 ended with signal 9, and the run with it" in said


@pytest.mark.parametrize(
    ("killed", "waiting", "words"),
    [
        (1, 0, "rank 1 on node 1 ended with signal 9; its output says more"),
        (0, 1, "rank 1 on node 1 cannot reach node 0"),
    ],
)
def test_a_rank_that_is_killed_before_all_have_met_is_named(
    server: Server, tmp_path: Path, killed: int, waiting: int, words: str
) -> None:
    """While it imports what it needs, and the other one does or waits for it."""
    port = free_port()
    nodes = [start(server, tmp_path, nodes=2, node=node, processes=1, port=port, steps=400) for node in (0, 1)]
    deadline = time.monotonic() + DEADLINE
    while str(killed) not in (ranks := ranks_of(nodes[killed].pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks[str(killed)], signal.SIGKILL)
    _, said = nodes[waiting].communicate(timeout=60)
    assert nodes[waiting].returncode == 2
    assert words in said
    assert nodes[killed].wait(60) == 2


def test_every_node_says_why_a_run_is_not_resumed(server: Server, tmp_path: Path) -> None:
    port, flags = free_port(), ("--resume_from_checkpoint", str(tmp_path / "nowhere"))
    second = start(server, tmp_path, *flags, nodes=2, node=1, processes=1, port=port)
    first = start(server, tmp_path, *flags, nodes=2, node=0, processes=1, port=port)
    for process, status in ((first, 2), (second, 1)):
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == status
        assert f"--resume_from_checkpoint {tmp_path}/nowhere: no checkpoint is there" in said


def test_ctrl_c_saves_what_there_is(server: Server, tmp_path: Path) -> None:
    running = start(server, tmp_path, steps=400)
    deadline = time.monotonic() + DEADLINE
    while len(rows(tmp_path)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = ranks_of(running.pid)
    assert len(ranks) == 2
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "go on with the same command and --resume_from_checkpoint auto" in said
    assert not ranks_left(tmp_path)
    assert not [path for pid in ranks.values() for path in segment_directory().glob(f"outrider-*-{pid}-*")]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_for_every_process_saves_what_there_is(server: Server, tmp_path: Path, processes: int) -> None:
    """As clusters and service managers send it to all of a job: ranks hear it twice, and collector and workers too."""
    running = start(server, tmp_path, steps=400, processes=processes)
    deadline = time.monotonic() + DEADLINE
    while len(rows(tmp_path)) < 4:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in [*descendants_of(running.pid), running.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    output, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "go on with the same command and --resume_from_checkpoint auto" in output
    summary = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes(), type=Summary)
    assert (tmp_path / "run" / f"checkpoint-{summary.steps}").is_dir()
    assert not ranks_left(tmp_path)
    assert "failed" not in output


def ranks_left(directory: Path) -> list[int]:
    """Ranks of this run that are still there."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ends at this moment
            command = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
            if b"outrider.cli.main\0train" in command and str(directory).encode() in command:
                found.append(int(path.name))
    return found
