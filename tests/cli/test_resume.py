"""Checkpoints and ledgers that belong together, and others."""

import shutil
from pathlib import Path

import msgspec
import pytest

from outrider.cli.resume import check_resume
from outrider.cli.train import main
from outrider.collector.groups import set_advantages
from outrider.collector.ledger import Ledger
from outrider.collector.pruning import Pruner
from outrider.contract.errors import UserError
from outrider.trainer.checkpoint import TrainerState, write_state
from outrider.trainer.config import RunConfig
from tests.collector.build import group

BATCHES = 6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six batches, the first three of which are in the archive, with checkpoints after 0, 2 and 6."""
    directory = tmp_path / "run"
    ledger = Ledger(directory / "ledger.sqlite", {"seed": "0"}, resume=False)
    for step in range(BATCHES):
        batch = [group(step)]
        set_advantages(batch, "none")
        ledger.finished(batch[0])
        ledger.trained(step, batch).result()
    pruner = Pruner(ledger, 3, pytest.fail)
    pruner.release(BATCHES)
    pruner._thread.submit(lambda: None).result()
    pruner.close()
    ledger.close()
    assert ledger.archive.steps() == [0, 1, 2]
    for version in (0, 2, BATCHES):
        save(directory, version, ledger.id)
    return directory


def save(run: Path, version: int, ledger: str) -> Path:
    """A checkpoint as far as this is about it."""
    path = run / f"checkpoint-{2 * version}"
    (path / "optimizer").mkdir(parents=True, exist_ok=True)
    state = TrainerState(
        step=2 * version, version=version, max_steps=99, time=1.0, model_fingerprint="abc", ledger=ledger
    )
    write_state(path, state)
    return path


def check(run: Path, checkpoint: Path | str = "auto") -> None:
    check_resume(RunConfig(output_dir=str(run), resume_from_checkpoint=str(checkpoint)))


@pytest.mark.parametrize("version", [0, 2, BATCHES])
def test_a_run_goes_on_from_each_of_its_checkpoints(run: Path, version: int) -> None:
    """From one before what was archived, too, and when the archive is kept elsewhere."""
    check(run)
    check(run, run / f"checkpoint-{2 * version}")
    shutil.rmtree(run / "rollouts")
    check(run, run / f"checkpoint-{2 * version}")


def test_a_copy_is_as_good(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in run.glob("ledger.sqlite*"):
        shutil.copy(path, copy)
    check(copy, run / f"checkpoint-{2 * BATCHES}")


@pytest.mark.parametrize("there", ["nothing", "an empty file", "a ledger without a batch"])
def test_without_the_ledger_prompts_would_be_trained_twice(run: Path, tmp_path: Path, there: str) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    if there == "an empty file":
        (fresh / "ledger.sqlite").touch()
    elif there == "a ledger without a batch":
        Ledger(fresh / "ledger.sqlite", {"seed": "0"}, resume=False).close()
    last = run / f"checkpoint-{2 * BATCHES}"
    with pytest.raises(UserError) as caught:
        check(fresh, last)
    assert str(caught.value) == (
        f"--resume_from_checkpoint {last}: {last} was trained on 6 batches, of which {fresh / 'ledger.sqlite'} records "
        "none, so that prompts would be trained twice: resume with the --output_dir of the run that saved it, or copy "
        "ledger.sqlite* and rollouts from there"
    )
    (last / "model.safetensors").touch()  # as a single process saves it
    with pytest.raises(UserError, match=f"from there, or start a new run with --model {last} and another --output_dir"):
        check(fresh, last)


def test_nothing_is_trained_twice_from_the_very_start(run: Path, tmp_path: Path) -> None:
    check(tmp_path / "fresh", run / "checkpoint-0")


def test_a_ledger_that_ends_too_early_says_from_where_it_can_go_on(run: Path) -> None:
    later = save(run, BATCHES + 1, "")
    with pytest.raises(UserError) as caught:
        check(run)
    assert str(caught.value).startswith(
        f"--resume_from_checkpoint auto: {later} was trained on 7 batches, of which {run / 'ledger.sqlite'} records 6, "
        f"so that prompts would be trained twice: go on with --resume_from_checkpoint {run / 'checkpoint-12'}, whose "
        "batches are recorded, or resume with the --output_dir"
    )
    shutil.rmtree(later)
    check(run)


def test_the_ledger_of_another_run(run: Path) -> None:
    other = save(run, 3, "of another run")
    with pytest.raises(UserError, match=f"{other} is of another run than the one that {run / 'ledger.sqlite'} records"):
        check(run, other)


def test_checkpoints_of_versions_that_did_not_name_their_ledger(run: Path) -> None:
    state = run / f"checkpoint-{2 * BATCHES}" / "outrider_state.json"
    fields = msgspec.json.decode(state.read_bytes())
    del fields["ledger"]
    state.write_bytes(msgspec.json.encode(fields))
    check(run)


def test_a_new_run_and_one_without_checkpoints_have_nothing_to_check(tmp_path: Path) -> None:
    check(tmp_path)
    check_resume(RunConfig(output_dir=str(tmp_path)))


def test_a_dry_run_says_so_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "m", "--dataset", "d.jsonl", "--reward_funcs", "exact_match", "--dry_run", "--output_dir"]
    resume = ["--resume_from_checkpoint", str(run / f"checkpoint-{2 * BATCHES}")]
    assert main([*words, str(run), *resume]) == 0
    assert "resume_from_checkpoint" in capsys.readouterr().out
    with pytest.raises(UserError, match="prompts would be trained twice"):
        main([*words, str(tmp_path / "fresh"), *resume])
