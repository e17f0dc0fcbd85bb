"""Real files of a real, small model; where a disk is full, it is so by the kernel's word or by that of one call."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer import rows, saving
from outrider.trainer.checkpoint import (
    TrainerState,
    earliest_resume,
    find_checkpoint,
    list_checkpoints,
    load_state,
    read_state,
    write_model,
    write_state,
)
from outrider.trainer.config import OptimizerConfig, RunConfig
from outrider.trainer.directories import SaveFailed, tidy, write_directory
from outrider.trainer.model import Policy
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import load_rows, model_tensors, optimizer_tensors, total_bytes
from outrider.trainer.saving import RowWriter, Saver
from outrider.trainer.spool import Spool, gathered
from tests.server.models import DEMO_MODEL, save_model
from tests.trainer.build import make_policy, one_a_row, random_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return make_policy(model)


@pytest.fixture(scope="module")
def optimizer(policy: Policy) -> torch.optim.Optimizer:
    """After one step, so that there is a state to keep."""
    made = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-3))
    policy.logprobs(one_a_row(random_samples(4, seed=20))).sum().backward()
    made.step()
    made.zero_grad(set_to_none=True)
    return made


def state_of(step: int, policy: Policy) -> TrainerState:
    return TrainerState(step=step, version=step, max_steps=9, time=1.5, model_fingerprint=policy.fingerprint)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def save(policy: Policy, optimizer: torch.optim.Optimizer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    """Saves the checkpoint of a step in ``tmp_path``."""

    def run(step: int, keep: int | None = None, only_model: bool = False) -> Path:
        config = RunConfig(save_total_limit=keep, save_only_model=only_model)
        saver = Saver(tmp_path, policy, optimizer, tokenizer, config, Ranks())
        try:
            saver.checkpoint(step, step, 9, 1.5)
        finally:
            saver.close()
        return tmp_path / f"checkpoint-{step}"

    return run


def resumed(path: Path, model: Path) -> tuple[Policy, torch.optim.Optimizer]:
    """What a run goes on with."""
    policy = make_policy(model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    optimizer = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-2))
    load_rows(path, policy.model, optimizer)
    return policy, optimizer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_what_is_loaded(
    save: Any, policy: Policy, optimizer: torch.optim.Optimizer, model: Path, tmp_path: Path
) -> None:
    path = save(3)
    assert path == tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3"]
    assert load_state(path, "a", policy.fingerprint) == state_of(3, policy)

    found, other = resumed(path, model)
    assert equal(model_tensors(found.model), model_tensors(policy.model))
    assert equal(optimizer_tensors(found.model, other), optimizer_tensors(policy.model, optimizer))


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_checkpoint_of_one_process_is_a_hugging_face_directory(save: Any, policy: Policy) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(save(3), dtype=torch.float32)
    assert equal(model_tensors(loaded), model_tensors(policy.model))


def test_a_resumed_optimizer_takes_the_same_step(save: Any, model: Path, tmp_path: Path) -> None:
    path = save(1)
    stepped = []
    for _ in range(2):
        policy, optimizer = resumed(path, model)
        policy.logprobs(one_a_row(random_samples(3, seed=21))).sum().backward()
        optimizer.step()
        stepped.append([parameter.detach() for parameter in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True))


def test_the_export_is_a_hugging_face_directory(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, model: Path, tmp_path: Path
) -> None:
    final, weights = tmp_path / "final", Spool(tmp_path, policy.model).take(gathered(policy.model))
    write_directory(final, lambda directory: write_model(directory, policy.model, tokenizer, weights), 0)
    loaded = AutoModelForCausalLM.from_pretrained(final)
    ids = torch.tensor([[5, 17, 40, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, policy.model.eval()(input_ids=ids).logits)
    policy.model.train()
    ours, theirs = AutoTokenizer.from_pretrained(final), AutoTokenizer.from_pretrained(model)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_checkpoints_are_listed_by_step_and_only_whole_ones(save: Any, tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(step)
    (tmp_path / "checkpoint-200.unfinished").mkdir()
    (tmp_path / "checkpoint-300").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-100"
    assert find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path) == tmp_path / "checkpoint-9"


def test_the_newest_are_kept(save: Any, tmp_path: Path) -> None:
    for step in range(1, 5):
        save(step, keep=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert earliest_resume(tmp_path) == 3


def test_saving_a_step_again_replaces_it(save: Any, policy: Policy, tmp_path: Path) -> None:
    path = save(2)
    (path / "left-over").touch()
    save(2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert not (path / "left-over").exists()
    assert load_state(path, "a", policy.fingerprint).step == 2


def test_auto_without_any_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    assert earliest_resume(tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "never made") is None


def test_a_path_that_is_no_checkpoint(save: Any, tmp_path: Path) -> None:
    save(4)
    with pytest.raises(UserError, match=r"no checkpoint is there; those of the run: .*checkpoint-4"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path)


@pytest.mark.parametrize("wanted", ["auto", "the path"])
def test_checkpoints_without_an_optimizer_cannot_be_resumed(save: Any, tmp_path: Path, wanted: str) -> None:
    path = save(4, only_model=True)
    with pytest.raises(UserError, match=r"checkpoint-4 was saved with --save_only_model") as caught:
        find_checkpoint("auto" if wanted == "auto" else str(path), tmp_path)
    assert f"start a new run with --model {path}" in str(caught.value)


def test_auto_takes_the_newest_that_can_be_resumed(save: Any, tmp_path: Path) -> None:
    save(4)
    save(5, only_model=True)
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-4"


def test_checkpoints_of_the_former_format_are_refused(save: Any, tmp_path: Path) -> None:
    path = save(4, only_model=True)
    (path / "optimizer.pt").touch()
    with pytest.raises(UserError, match=r"checkpoint-4 was saved by an earlier version, .* --model .*checkpoint-4"):
        find_checkpoint("auto", tmp_path)


def test_another_model_is_refused(save: Any) -> None:
    path = save(1)
    with pytest.raises(UserError, match=r"is of another model \(fingerprint .*\), this run has --model b \(finger"):
        load_state(path, "b", "1234")
    write_state(path, msgspec.structs.replace(read_state(path), model="Qwen/a"))
    with pytest.raises(UserError, match=r"checkpoint-1 is of Qwen/a \(fingerprint "):
        load_state(path, "b", "1234")


def test_another_shape_is_refused(save: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint-1: model.embed_tokens.weight has the shape \[99, 64\] in"):
        resumed(save(1), DEMO_MODEL)


def test_broken_files_are_named(save: Any, policy: Policy, model: Path) -> None:
    path = save(1)
    file = path / "optimizer" / "00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint-1: .*optimizer cannot be read"):
        resumed(path, model)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-1: model.embed_tokens.weight has the shape of nothing"):
        resumed(path, model)
    (path / "outrider_state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"outrider_state.json cannot be read"):
        load_state(path, "a", policy.fingerprint)


def test_what_a_killed_process_left_is_put_in_order(save: Any, tmp_path: Path) -> None:
    path = save(1)
    path.rename(tmp_path / "checkpoint-1.replaced")  # killed between two renames
    (tmp_path / "checkpoint-1.unfinished").mkdir()
    (tmp_path / "checkpoint-2.unfinished").mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint("auto", tmp_path) == path


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (rows, "synchronize", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (rows, "save_file", SafetensorError("Error while serializing: I/O error: No space left")),
        (saving.HostCopy, "take", RuntimeError("[enforce fail at alloc_cpu.cpp:121] can't allocate memory")),
        (PreTrainedTokenizerBase, "save_pretrained", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_failed_save_leaves_earlier_ones_and_nothing_half(
    save: Any, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str,
    error: Exception,
) -> None:  # fmt: skip
    save(1)
    before = contents(tmp_path / "checkpoint-1")

    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(module, function, failing)
        for step in (1, 2):  # in place of the earlier one, and beside it
            with pytest.raises(SaveFailed, match=f"checkpoint-{step}: .* MiB are free there"):
                save(step, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert contents(tmp_path / "checkpoint-1") == before
    save(2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    """A disk that a checkpoint has filled to the brim would have no room for the ledger."""
    begun = []
    with pytest.raises(SaveFailed, match=r"No space left on device: it takes [\d,]+\.\d MiB \([\d,.]+ MiB are free"):
        write_directory(tmp_path / "final", begun.append, 2**62)
    assert begun == []
    assert names(tmp_path) == []


def test_the_estimate_is_what_is_written(save: Any, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    path = save(1)
    written = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    tensors = model_tensors(policy.model), optimizer_tensors(policy.model, optimizer)
    assert written == pytest.approx(sum(total_bytes(group.values()) for group in tensors), rel=0.1)


def test_a_copy_is_of_now_and_of_its_own(
    policy: Policy, optimizer: torch.optim.Optimizer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = [*model_tensors(policy.model).values(), *optimizer_tensors(policy.model, optimizer).values()]
    before = [tensor.clone() for tensor in held]
    saver = Saver(tmp_path, policy, optimizer, tokenizer, RunConfig(), Ranks())
    saver.begin_checkpoint(1, 1, 9, 1.5)
    saver.wait_for_copy()
    with torch.no_grad():
        for tensor in held:
            tensor.add_(1.0)
    saver.close()
    with torch.no_grad():
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)
    path = tmp_path / "checkpoint-1"
    saved = load_file(path / "model.safetensors") | load_file(path / "optimizer" / "00001-of-00001.safetensors")
    found = [saved[name] for name in [*model_tensors(policy.model), *optimizer_tensors(policy.model, optimizer)]]
    assert all(torch.equal(value, expected) for value, expected in zip(found, before, strict=True))


def test_tied_weights_are_saved_once_and_stay_tied(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = make_policy(DEMO_MODEL)
    optimizer = make_optimizer(policy.model, OptimizerConfig())
    assert total_bytes(model_tensors(policy.model).values()) == sum(p.nbytes for p in policy.model.parameters())
    writer = RowWriter(policy, optimizer, Ranks())
    rows = writer.rows()
    writer.begin(lambda: writer.write(tmp_path, rows)).result()
    writer.close()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    other = make_policy(DEMO_MODEL)
    load_rows(tmp_path, other.model, make_optimizer(other.model, OptimizerConfig()))
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight


WRITES = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from outrider.trainer.config import OptimizerConfig, RunConfig
from outrider.trainer.directories import SaveFailed
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.saving import Saver
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import load_rows, model_tensors, optimizer_tensors, total_bytes
from outrider.trainer.saving import RowWriter, Saver
from outrider.trainer.spool import Spool, gathered
from tests.trainer.build import make_policy, one_a_row, random_samples

model, directory, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
policy = make_policy(model)
optimizer = make_optimizer(policy.model, OptimizerConfig())
policy.logprobs(one_a_row(random_samples(2, seed=0))).sum().backward()
optimizer.step()
saver = Saver(directory, policy, optimizer, AutoTokenizer.from_pretrained(model), RunConfig(), Ranks())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    saver.checkpoint(1, 1, 1, 0.0)
except SaveFailed as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["weights", "optimizer"])
def test_no_file_may_grow_beyond_the_limit_of_the_kernel(model: Path, tmp_path: Path, share: float) -> None:
    """The weights are one file, the optimizer's state another one twice as large: each meets the limit once."""
    limit = int((model / "model.safetensors").stat().st_size * share)
    command = [sys.executable, "-c", WRITES, str(model), str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.startswith(f"refused: {tmp_path / 'checkpoint-1'}: "), done.stdout
    assert names(tmp_path) == []


def test_other_mistakes_are_not_called_a_full_disk(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        write_directory(tmp_path / "final", write, 0)
    assert not (tmp_path / "final").exists()


def test_the_state_is_plain_json(save: Any) -> None:
    content = msgspec.json.decode((save(6) / "outrider_state.json").read_bytes())
    assert (content["step"], content["max_steps"]) == (6, 9)
