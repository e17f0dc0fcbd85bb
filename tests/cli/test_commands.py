import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import torch

from outrider.cli import main as outrider
from outrider.cli import rollout
from outrider.cli.rollout import parse_rollout
from outrider.collector.config import CollectorSpec
from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig
from outrider.server.vllm_engine import command, launcher
from outrider.trainer.spec import TrainerSpec

TRAIN = ["train", "--model", "m", "--dataset", "d.jsonl", "--reward_funcs", "accuracy"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPROC_PER_NODE", "1")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with the given contents where a command imports it from."""

    def install(name: str, **contents: object) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert outrider.main(argv) == 0
        assert "rollout   serve a model" in capsys.readouterr().out
    assert outrider.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("outrider ")


@pytest.mark.parametrize("command", ["rollout", "train"])
def test_help_of_a_command_needs_no_other_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outrider.main([command, "--bad", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: outrider {command}")
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(("name", "remedy"), [("trian", "did you mean train?"), ("xyz", "there are rollout, train")])
def test_unknown_commands(name: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outrider.main([name]) == 2
    assert remedy in capsys.readouterr().err


def test_errors_of_users_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert outrider.main([*TRAIN, "--prt", "1", "--top_p", "7"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "outrider: --prt is not a flag of outrider train: 'outrider train --help' lists the flags",
        "outrider: --top_p is '7': expected a finite number > 0 and <= 1",
    ]


def test_interruption(installed: Callable[..., None]) -> None:
    def interrupted(config: RolloutConfig) -> int:
        raise KeyboardInterrupt

    installed("outrider.server.launch", serve=interrupted)
    assert outrider.main(["rollout", "--model", "m"]) == 130


def test_other_errors_keep_their_traceback(installed: Callable[..., None]) -> None:
    def broken(config: RolloutConfig) -> int:
        raise RuntimeError("a defect")

    installed("outrider.server.launch", serve=broken)
    with pytest.raises(RuntimeError, match="a defect"):
        outrider.main(["rollout", "--model", "m"])


def test_rollout_serves(installed: Callable[..., None]) -> None:
    served = []
    installed("outrider.server.launch", serve=lambda config: served.append(config) or 7)
    assert outrider.main(["rollout", "--model", "m", "--port", "9"]) == 7
    assert served == [RolloutConfig(model="m", port=9, engine="torch")]


@pytest.mark.parametrize(("command", "module"), [("demo", "outrider.demo.run"), ("show", "outrider.cli.show")])
def test_commands_of_other_rooms(command: str, module: str, installed: Callable[..., None]) -> None:
    installed(module, main=lambda argv: len(argv))
    assert outrider.main([command, "a", "b", "c"]) == 3


def test_train_trains_and_warns(installed: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    trained: list[tuple[TrainerSpec, bytes]] = []
    installed("outrider.trainer.run", train=lambda trainer, collector, check: trained.append((trainer, collector)) or 0)
    assert outrider.main([*TRAIN, "--max_staleness", "1", "--top_p", "0.8"]) == 0
    ((trainer, encoded),) = trained
    collector = msgspec.msgpack.decode(encoded, type=CollectorSpec)
    assert (collector.sampling.top_p, collector.max_staleness, trainer.max_staleness) == (0.8, 1, 1)
    assert collector.run_id == trainer.run_id
    assert capsys.readouterr().err.startswith("outrider: warning: --top_p 0.8")


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert outrider.main([*TRAIN, "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_dry_runs_start_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert outrider.main([*TRAIN, "--dry_run"]) == 0
    assert "1 prompt x 8 rollouts" in capsys.readouterr().out
    assert outrider.main(["rollout", "--model", "m", "--dry_run", "--api_key", "sesame"]) == 0
    out = capsys.readouterr().out
    assert ["engine", "torch"] in [line.split() for line in out.splitlines()]
    assert "sesame" not in out


@pytest.mark.parametrize(
    ("flags", "installed", "engine"),
    [
        ("", None, "torch"),
        ("", "0.32.0", "torch"),  # and no GPU
        ("--engine torch", "0.32.0", "torch"),
        ("--engine vllm", None, "vllm"),  # which says what is missing when it is started
        ("--tensor_parallel_size 2", "0.32.0", "vllm"),
        ("--engine vllm --vllm_enforce_eager", "0.32.0", "vllm"),
    ],
)
def test_the_engine_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, flags: str, installed: str | None, engine: str
) -> None:
    monkeypatch.setattr(rollout, "vllm_version", lambda: installed)
    assert parse_rollout(["--model", "m", *flags.split()]).engine == engine


def test_auto_is_vllm_where_it_is_installed_and_a_gpu_is_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    """The command that would be run, too: two servers, for a small model."""
    monkeypatch.setattr(rollout, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(command, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launcher, "visible_gpus", lambda: [80 * 2**30])
    assert outrider.main(["rollout", "--model", str(demo_model), "--engine", "auto", "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "# DIRECTORY is made at the start; 2 servers" in out
    assert "each on a loopback port of its own behind 0.0.0.0:8000" in out
    assert ["engine", "vllm"] in [line.split() for line in out.splitlines()]
    assert "2 servers like this one" in out
    assert "vllm.entrypoints.openai.api_server" in out
    assert "--gpu-memory-utilization" in out


def test_a_dry_run_says_what_is_wrong_with_this_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    monkeypatch.setattr(command, "_installed", lambda: ("vllm", "0.99.0"))
    monkeypatch.setattr(launcher, "visible_gpus", list)
    words = ["rollout", "--model", str(demo_model), "--engine", "vllm", "--dry_run", "--log_level", "error"]
    assert outrider.main(words) == 0
    out, err = capsys.readouterr()
    untried, lacking = err.splitlines()
    assert untried.startswith("outrider: warning: vLLM 0.99.0 has not been tried")
    assert "is built for GPUs, and none is visible" in lacking
    assert "# DIRECTORY is made at the start\n" in out


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--tensor_parallel_size 2", ["--tensor_parallel_size 2", "one device", "--engine vllm"]),
        ("--vllm_tensor_parallel_size 2", ["--tensor_parallel_size 2"]),
        ("--api_key=", ["--api_key is empty"]),
        ("--vllm_pipeline_parallel_size 2", ["ms-swift has it"]),
    ],
)
def test_what_a_server_cannot_do(monkeypatch: pytest.MonkeyPatch, line: str, parts: list[str]) -> None:
    monkeypatch.setattr(rollout, "vllm_version", lambda: None)
    with pytest.raises(UserError) as caught:
        parse_rollout(["--model", "m", *line.split()])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_commands_load_no_heavy_library() -> None:
    program = (
        "import sys, outrider.cli.main, outrider.cli.swift\n"
        "outrider.cli.main.main(['train', '--help']); outrider.cli.main.main(['rollout', '--help'])\n"
        f"assert outrider.cli.main.main({[*TRAIN, '--dry_run']!r}) == 0\n"
        "print('loaded:', sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m outrider.cli.main train --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
