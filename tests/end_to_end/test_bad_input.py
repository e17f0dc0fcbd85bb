"""What a user reads who has made a mistake: one message, with the offender, what was found and the remedy."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from tests.end_to_end.conftest import Train, write_rows
from tests.end_to_end.processes import Command, Done, assert_one_message
from tests.server.models import save_model

pytestmark = pytest.mark.runs

#: Refused before anything is loaded: flags, and parts of the message.
AT_ONCE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a flag misspelt": ({"max_stalenes": 1}, ["--max_stalenes is not a flag", "did you mean --max_staleness?"]),
    "two flags that contradict each other": (
        {"max_staleness": 3, "async_generate": "true"},
        ["--max_staleness 3", "--async_generate true", "leave out --async_generate"],
    ),
    "two ways to hold out": (
        {"val_dataset": "a.jsonl", "split_dataset_ratio": 0.1},
        ["--val_dataset a.jsonl", "--split_dataset_ratio 0.1", "give one of them"],
    ),
    "a batch of no whole groups": (
        {"num_generations": 5},
        ["32 rollouts", "--num_generations 5", "--per_device_train_batch_size 30 or 35"],
    ),
    "a generation batch of no whole groups": (
        {"generation_batch_size": 33},
        ["--generation_batch_size 33", "--num_generations 4", "--generation_batch_size 32 or 64"],
    ),
    "an output directory that is a file": (
        {"output_dir": "occupied"},
        ["--output_dir occupied is a file", "choose a directory"],
    ),
    "an output directory that cannot be made": (
        {"output_dir": "/proc/run"},
        ["--output_dir /proc/run cannot be made", "choose a directory"],
    ),
}

#: Refused when the collector has looked at servers, data and rewards.
AFTER_A_LOOK: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a server that is not there": (
        {"vllm_server_port": 1, "vllm_server_timeout": 2},
        ["127.0.0.1:1", "--vllm_server_timeout 2 s", "GET http://127.0.0.1:1/outrider/info", "`outrider rollout`"],
    ),
    "a wrong key": (
        {"vllm_server_api_key": "wrong"},
        ["refuses the API key", "--vllm_server_api_key", "OUTRIDER_API_KEY"],
    ),
    "another model": (
        {"model": "{place}/model"},
        ["serves the model {demo}", "--model {place}/model", "start both with the same model"],
    ),
    "another tokenizer": (
        {"model": "{place}/tokenizer"},
        ["the tokenizer of {demo}", "--model {place}/tokenizer", "start both with the same tokenizer"],
    ),
    "completions longer than the server takes": (
        {"max_completion_length": 5000},
        ["--max_completion_length 5000", "tokens in all", "--max_model_len"],
    ),
    "no column for prompts": (
        {"dataset": "{place}/questions.jsonl"},
        ["--dataset {place}/questions.jsonl", "no column 'prompt' or 'messages'", "question, solution"],
    ),
    "no such file": ({"dataset": "{place}/none.jsonl"}, ["--dataset {place}/none.jsonl", "no such file"]),
    "a file that is not JSON": (
        {"dataset": "{place}/broken.jsonl"},
        ["--dataset {place}/broken.jsonl", "cannot be read", "JSON"],
    ),
    "no such reward": ({"reward_funcs": "exact_mach"}, ["no reward 'exact_mach'", "did you mean 'exact_match'?"]),
    "a checkpoint that is none": (
        {"resume_from_checkpoint": "{place}/nowhere"},
        ["--resume_from_checkpoint {place}/nowhere", "no checkpoint is there"],
    ),
}


@pytest.fixture(scope="module")
def place(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that are wrong."""
    directory = tmp_path_factory.mktemp("wrong")
    save_model("qwen3", directory / "model")
    swapped = copytree(demo_model, directory / "tokenizer") / "tokenizer.json"
    tokenizer = json.loads(swapped.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    swapped.write_text(json.dumps(tokenizer))
    write_rows(directory / "questions.jsonl", [{"question": "1+1=", "solution": "2"}])
    write_rows(directory / "unsolved.jsonl", [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(9)])
    (directory / "broken.jsonl").write_text('{"prompt": "1+1=", "solu\nnothing')
    return directory


@pytest.fixture(scope="module")
def attempts(
    train: Train, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Done]"]]:
    """All of AFTER_A_LOOK, two at a time: they take nothing from the server but its description."""

    def attempt(changes: dict[str, Any]) -> Done:
        filled = {name: str(value).format(place=place) for name, value in changes.items()}
        return train(tmp_path_factory.mktemp("attempt"), **filled).wait()

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(attempt, changes) for name, (changes, _) in AFTER_A_LOOK.items()}


@pytest.mark.parametrize("name", AT_ONCE)
def test_mistakes_on_the_command_line(name: str, train: Train, tmp_path: Path) -> None:
    changes, parts = AT_ONCE[name]
    (tmp_path / "occupied").touch()
    assert_one_message(train(tmp_path, **changes).wait(), parts)


@pytest.mark.parametrize("name", AFTER_A_LOOK)
def test_mistakes_found_by_looking(
    name: str, attempts: dict[str, "Future[Done]"], place: Path, demo_model: Path
) -> None:
    _, parts = AFTER_A_LOOK[name]
    assert_one_message(attempts[name].result(), [part.format(place=place, demo=demo_model) for part in parts])


def test_a_port_that_is_taken(port: int, demo_model: Path, tmp_path: Path) -> None:
    words = ["rollout", "--model", str(demo_model), "--host", "127.0.0.1", "--port", str(port)]
    assert_one_message(Command("outrider", words, tmp_path).wait(), [f"--port {port}: taken", "choose another port"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"reward_funcs": "{data}/rewards.py:raises"},
            ["reward raises raised ValueError: there is a mistake in it", "rewards.py:"],
        ),
        (
            {"reward_funcs": "{data}/rewards.py:hangs", "reward_timeout": 1},
            ["reward hangs: no result within --reward_timeout 1 s"],
        ),
        (
            {"dataset": "{place}/unsolved.jsonl"},
            ["--reward_funcs exact_match needs the column 'solution'", "--dataset has only", "answer"],
        ),
    ],
    ids=["raises", "hangs", "lacks a column"],
)
def test_rewards_that_never_work_end_the_run(
    changes: dict[str, Any], parts: list[str], train: Train, data: Path, place: Path, tmp_path: Path
) -> None:
    filled = {name: str(value).format(data=data, place=place) for name, value in changes.items()}
    assert_one_message(train(tmp_path, **filled).wait(), parts)


def test_a_directory_that_may_only_be_read(train: Train, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        done = train(tmp_path, output_dir=place).wait()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert_one_message(done, [f"--output_dir {place} cannot be written to", "Read-only file system"])
