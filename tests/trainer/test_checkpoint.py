"""Real files of a real, small model; where a disk is full, it is so by the kernel's word or by that of one call."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer.checkpoint import (
    Contents,
    SaveFailed,
    TrainerState,
    earliest_resume,
    find_checkpoint,
    list_checkpoints,
    load_optimizer,
    load_state,
    save_checkpoint,
    write_directory,
    write_model,
)
from outrider.trainer.config import OptimizerConfig
from outrider.trainer.model import Policy
from outrider.trainer.optimizer import make_optimizer
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
    return TrainerState(step=step, max_steps=9, time=1.5, model_fingerprint=policy.fingerprint)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def contents(policy: Policy, optimizer: torch.optim.Optimizer, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What a checkpoint of a step holds."""

    def of(step: int, only_model: bool = False) -> Contents:
        kept = None if only_model else optimizer.state_dict()
        return Contents(state_of(step, policy), policy.model, tokenizer, policy.model.state_dict(), kept)

    return of


@pytest.fixture
def save(contents: Any, tmp_path: Path) -> Any:
    """Saves the checkpoint of a step in ``tmp_path``."""

    def run(step: int, keep: int | None = None, only_model: bool = False) -> Path:
        return save_checkpoint(tmp_path, contents(step, only_model), keep)

    return run


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_what_is_loaded(
    save: Any, policy: Policy, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    path = save(3)
    assert path == tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3"]
    assert load_state(path, policy.fingerprint) == state_of(3, policy)

    resumed = make_policy(path)
    assert resumed.fingerprint == policy.fingerprint
    for (name, found), expected in zip(resumed.model.named_parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    other = make_optimizer(resumed.model, OptimizerConfig())
    load_optimizer(path, other)
    for found, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(found[key], expected[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_a_resumed_optimizer_takes_the_same_step(save: Any, tmp_path: Path) -> None:
    path = save(1)
    stepped = []
    for _ in range(2):
        policy = make_policy(path)
        optimizer = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-2))
        load_optimizer(path, optimizer)
        policy.logprobs(one_a_row(random_samples(3, seed=21))).sum().backward()
        optimizer.step()
        stepped.append([parameter.detach() for parameter in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True))


def test_the_export_is_a_hugging_face_directory(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, model: Path, tmp_path: Path
) -> None:
    final, weights = tmp_path / "final", policy.model.state_dict()
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
    assert load_state(path, policy.fingerprint).step == 2


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


def test_another_model_is_refused(save: Any) -> None:
    path = save(1)
    with pytest.raises(UserError, match=r"is of a model with fingerprint .*, --model has 1234"):
        load_state(path, "1234")


def test_broken_files_are_named(save: Any, policy: Policy) -> None:
    path = save(1)
    (path / "optimizer.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint-1: optimizer.pt cannot be loaded"):
        load_optimizer(path, make_optimizer(policy.model, OptimizerConfig()))
    (path / "outrider_state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"outrider_state.json cannot be read"):
        load_state(path, policy.fingerprint)


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (torch, "save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
        (PreTrainedTokenizerBase, "save_pretrained", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (safetensors.torch, "serialize_file", SafetensorError("Error while serializing: I/O error: No space left")),
    ],
)
def test_a_failed_save_leaves_earlier_ones_and_nothing_half(
    save: Any, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str,
    error: Exception,
) -> None:  # fmt: skip
    save(1)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}

    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(module, function, failing)
        for step in (1, 2):  # in place of the earlier one, and beside it
            with pytest.raises(SaveFailed, match=f"checkpoint-{step}: .* MiB are free there"):
                save(step, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == before
    save(2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    """A disk that a checkpoint has filled to the brim would have no room for the ledger."""
    begun = []
    with pytest.raises(SaveFailed, match=r"No space left on device: it takes [\d,]+\.\d MiB \([\d,.]+ MiB are free"):
        write_directory(tmp_path / "final", begun.append, 2**62)
    assert begun == []
    assert names(tmp_path) == []


def test_the_estimate_is_what_is_written(save: Any, contents: Any) -> None:
    path = save(1)
    written = sum((path / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert written == pytest.approx(contents(1).nbytes, rel=0.1)


def test_a_copy_is_of_now_and_of_its_own(contents: Any, policy: Policy, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in contents(1).optimizer["state"].values()]
    copy = contents(1).copy()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    for state in contents(1).optimizer["state"].values():
        state["exp_avg"].add_(1.0)
    path = save_checkpoint(tmp_path, copy, None)
    saved = make_policy(path).model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    found = torch.load(path / "optimizer.pt", weights_only=True)["state"].values()
    assert all(torch.equal(state["exp_avg"], value) for state, value in zip(found, moments, strict=True))


def test_a_copy_keeps_tied_weights_tied(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = make_policy(DEMO_MODEL)
    contents = Contents(state_of(1, policy), policy.model, tokenizer, policy.model.state_dict(), None)
    copy = contents.copy()
    assert copy.weights["lm_head.weight"] is copy.weights["model.embed_tokens.weight"]
    assert copy.nbytes == contents.nbytes == sum(p.nbytes for p in policy.model.parameters())
    plain = (save_checkpoint(tmp_path, contents, None) / "model.safetensors").read_bytes()
    assert (save_checkpoint(tmp_path, copy, None) / "model.safetensors").read_bytes() == plain


def test_no_memory_for_a_copy_is_a_failed_save(contents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    held = contents(7)
    monkeypatch.setattr(torch.Tensor, "to", failing)
    with pytest.raises(SaveFailed, match=r"checkpoint-7: no memory for a copy: .*can't allocate memory"):
        held.copy()


WRITES = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from outrider.trainer.checkpoint import Contents, SaveFailed, TrainerState, save_checkpoint
from outrider.trainer.config import OptimizerConfig
from outrider.trainer.optimizer import make_optimizer
from tests.trainer.build import make_policy, one_a_row, random_samples

model, directory, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
policy = make_policy(model)
optimizer = make_optimizer(policy.model, OptimizerConfig())
policy.logprobs(one_a_row(random_samples(2, seed=0))).sum().backward()
optimizer.step()
state = TrainerState(step=1, max_steps=1, time=0.0, model_fingerprint=policy.fingerprint)
tokenizer = AutoTokenizer.from_pretrained(model)
contents = Contents(state, policy.model, tokenizer, policy.model.state_dict(), optimizer.state_dict())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(directory, contents, None)
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
