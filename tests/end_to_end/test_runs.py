"""Runs from the first command to the last file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.observe.metrics import evaluations_of, read_metrics
from tests.end_to_end.conftest import Train
from tests.end_to_end.processes import Command, assert_one_message
from tests.end_to_end.records import check_finished, check_ledger, steps, summary, trained

pytestmark = pytest.mark.runs

GROUPS = 8


@pytest.fixture(scope="module")
def synchronous(train: Train, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run twice, K = 0."""
    runs = []
    for name in ("first", "second"):
        directory = tmp_path_factory.mktemp(name)
        done = train(directory, max_steps=4, seed=3).wait()
        assert (done.status, done.err) == (0, "")
        runs.append(directory / "run")
    return runs


def test_a_synchronous_run(synchronous: list[Path], demo_model: Path) -> None:
    run = synchronous[0]
    check_finished(run, count=4, groups=GROUPS, bound=0)
    assert all(row.logprob_gap < 1e-4 for row in steps(run))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (demo_model, run / "final"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_a_seed_fixes_every_token_and_every_loss(synchronous: list[Path]) -> None:
    first, second = synchronous
    assert trained(first) == trained(second)
    assert [(row.loss, row.grad_norm) for row in steps(first)] == [(row.loss, row.grad_norm) for row in steps(second)]


def test_show_prints_rollouts(synchronous: list[Path]) -> None:
    run = synchronous[0]
    done = Command("outrider", ["show", str(run), "--step", "2"], run.parent).wait()
    assert (done.status, done.err) == (0, "")
    assert "4 of 4 steps" in done.out
    assert "32 rollouts of 8 groups" in done.out
    assert "staleness 0" in done.out


def test_a_finished_run_is_not_resumed_but_a_lost_result_is_written_again(
    synchronous: list[Path], train: Train
) -> None:
    run = synchronous[1]
    again = {"max_steps": 4, "seed": 3, "resume_from_checkpoint": "auto"}
    done = train(run.parent, **again).wait()
    assert done.status == 2
    assert "is at step 4 and the run has 4: raise --max_steps" in done.err
    (run / "final").rename(run / "moved")
    assert train(run.parent, **again).wait().status == 0
    check_finished(run, count=4, groups=GROUPS, bound=0)
    assert (run / "final" / "model.safetensors").read_bytes() == (run / "moved" / "model.safetensors").read_bytes()


def test_the_directory_of_a_run_is_for_no_other(synchronous: list[Path], train: Train, data: Path) -> None:
    run = synchronous[0]
    before = trained(run)
    again = {"max_steps": 5, "resume_from_checkpoint": "auto"}
    for changes, parts in [
        ({"max_steps": 4, "seed": 3}, ["holds another run's ledger", "choose another directory", "auto"]),
        ({**again, "seed": 7}, ["run with seed 3; this one has 7", "resume with the same settings"]),
        ({**again, "seed": 3, "dataset": data / "heldout.jsonl"}, ["is of a run with dataset", "rows, hash"]),
        ({**again, "seed": 3, "dataset_shuffle": "false"}, ["run with dataset_shuffle true; this one has false"]),
    ]:
        assert_one_message(train(run.parent, **changes).wait(), parts)
    assert trained(run) == before


def test_a_checkpoint_is_not_resumed_without_its_ledger(synchronous: list[Path], train: Train, tmp_path: Path) -> None:
    """The run would begin its epoch again."""
    checkpoint = synchronous[0] / "checkpoint-4"
    done = train(tmp_path, seed=3, max_steps=5, resume_from_checkpoint=checkpoint).wait()
    assert_one_message(done, [f"{checkpoint} was trained on 4 batches, of which run/ledger.sqlite records none"])
    assert not (tmp_path / "run" / "collector.log").exists(), "nothing was started for it"


def test_an_asynchronous_run_with_evaluation(train: Train, data: Path, tmp_path: Path) -> None:
    held_out = data / "heldout.jsonl"
    done = train(tmp_path, max_steps=4, max_staleness=2, val_dataset=held_out, eval_steps=2, loss_type="bnpo").wait()
    assert (done.status, done.err) == (0, "")
    run = tmp_path / "run"
    check_finished(run, count=4, groups=GROUPS, bound=2)
    evaluations = evaluations_of(read_metrics(run / "metrics.jsonl"))
    assert [row.step for row in evaluations] == [0, 2, 4]
    assert all((row.count, row.failed) == (12, 0) for row in evaluations)
    assert all(row.version_min >= row.step for row in evaluations)
    assert summary(run).reward_after == evaluations[-1].reward


def test_a_divergence_term_a_file_of_flags_and_a_reward_of_ones_own(train: Train, data: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(
        f"beta: 0.04\nloss_type: grpo\nreward_funcs: [{data / 'rewards.py'}:right]\nmax_tokens_per_micro_batch: 200\n"
    )
    done = train(tmp_path, config="flags.yaml", beta=None, loss_type=None, reward_funcs=None).wait()
    assert (done.status, done.err) == (0, "")
    check_finished(tmp_path / "run", count=3, groups=GROUPS, bound=0)
    divergence = [row.kl for row in steps(tmp_path / "run")]
    assert divergence[0] == pytest.approx(0.0, abs=1e-6)  # the policy still is the reference
    assert divergence[-1] > divergence[0]


@pytest.fixture(scope="module")
def swift_run(train: Train, demo_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """ms-swift's two commands. The server is killed in the middle of the run and started again on its port."""
    directory = tmp_path_factory.mktemp("swift")
    words = ["rollout", "--model", str(demo_model), "--host", "127.0.0.1", "--vllm_tensor_parallel_size", "1"]
    words += ["--threads", "1", "--vllm_max_model_len", "64"]
    server = Command("swift", [*words, "--port", "0"], directory)
    try:
        port = server.wait_for(r"\Alistening on 127\.0\.0\.1:(\d+)").group(1)
        trainer = train(
            directory,
            program="swift",
            train_type="full",
            use_vllm="true",
            vllm_mode="server",
            vllm_server_port=port,
            vllm_server_timeout=60,
            async_generate="true",
            loss_type="dr_grpo",
            reward_funcs=f"{data / 'rewards.py'}:unhurried",
            max_steps=10,
        )
        trainer.wait_for("^step 3/")
        server.end()
        server = Command("swift", [*words, "--port", port], directory)
        done = trainer.wait()
    finally:
        server.end()
    assert (done.status, done.err) == (0, "")
    return directory / "run", done.out


def test_the_commands_of_ms_swift(swift_run: tuple[Path, str]) -> None:
    run, _ = swift_run
    assert [row.step for row in steps(run)] == list(range(1, 11))
    assert all(row.staleness_max <= 1 for row in steps(run))


def test_a_server_may_be_killed_and_come_back(swift_run: tuple[Path, str]) -> None:
    run, out = swift_run
    assert "server lost: http://127.0.0.1:" in out
    assert "is back after" in out
    assert summary(run).finished
    check_ledger(run, count=10, groups=GROUPS, bound=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, where this user may mount one: enough for the ledger, not for a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_costs_checkpoints_but_neither_the_run_nor_its_result(train: Train, small_disk: Path) -> None:
    trainer = train(small_disk, max_steps=2, save_steps=1)
    trainer.wait_for(r"checkpoint not saved: \S+checkpoint-1: .* MiB are free there\); training goes on")
    trainer.wait_for(r"the last checkpoint could not be saved: \S+checkpoint-2: .*free space")
    assert not list((small_disk / "run").glob("checkpoint-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert trainer.wait().status == 0
    check_finished(small_disk / "run", count=2, groups=GROUPS, bound=0)
    assert (small_disk / "run" / "checkpoint-2" / "optimizer").is_dir()
