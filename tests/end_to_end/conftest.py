"""A rollout server, data, and the commands of users, all real."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from outrider.demo.task import problems, write_jsonl
from tests.end_to_end.processes import Command

REWARDS = """
import asyncio

def right(completions, solution, **columns):
    return [float(text.strip() == answer) for text, answer in zip(completions, solution)]

async def unhurried(completions, solution, **columns):
    await asyncio.sleep(0.2)
    return right(completions, solution)

async def raises(completions, **columns):
    raise ValueError("there is a mistake in it")

async def hangs(completions, **columns):
    await asyncio.sleep(1000)
"""

Train = Callable[..., Command]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``train.jsonl``, ``heldout.jsonl`` and ``rewards.py``."""
    directory = tmp_path_factory.mktemp("data")
    write_jsonl(directory / "train.jsonl", problems("train", 200, seed=0))
    write_jsonl(directory / "heldout.jsonl", problems("heldout", 12, seed=0))
    (directory / "rewards.py").write_text(REWARDS)
    return directory


@pytest.fixture(scope="session")
def port(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server for the whole session. It serves one run at a time."""
    words = ["rollout", "--model", str(demo_model), "--host", "127.0.0.1", "--port", "0", "--threads", "1"]
    server = Command("outrider", words, tmp_path_factory.mktemp("server"))
    try:
        yield int(server.wait_for(r"\Alistening on 127\.0\.0\.1:(\d+)").group(1))
    finally:
        server.end()


@pytest.fixture(scope="session")
def flags(demo_model: Path, data: Path, port: int) -> dict[str, str]:
    """A short run's flags."""
    return {
        "model": str(demo_model),
        "vllm_server_host": "127.0.0.1",
        "vllm_server_port": str(port),
        "dataset": str(data / "train.jsonl"),
        "reward_funcs": "exact_match",
        "per_device_train_batch_size": "32",
        "num_generations": "4",
        "max_completion_length": "8",
        "max_steps": "3",
        "learning_rate": "1e-4",
        "beta": "0",
        "loss_type": "dapo",
        "threads": "1",
        "output_dir": "run",
    }


@pytest.fixture(scope="session")
def train(flags: dict[str, str]) -> Iterator[Train]:
    """``train(directory, **changes)`` starts a trainer there. A change to None leaves the flag out. environment,
    to: see :class:`Command`."""
    started = []

    def start(
        directory: Path,
        program: str = "outrider",
        environment: Mapping[str, str] | None = None,
        to: int | None = None,
        **changes: object,
    ) -> Command:
        chosen = {name: value for name, value in (flags | changes).items() if value is not None}
        words = [word for name, value in chosen.items() for word in (f"--{name}", *str(value).split())]
        command = ["rlhf", "--rlhf_type", "grpo"] if program == "swift" else ["train"]
        started.append(Command(program, [*command, *words], directory, environment, to))
        return started[-1]

    yield start
    for command in started:
        command.end()


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
