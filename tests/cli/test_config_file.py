from pathlib import Path

import pytest

from outrider.cli.rollout import ROLLOUT
from outrider.cli.train_config import TrainConfig, parse_train
from outrider.contract.errors import UserError


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def problem(path: str, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_train(["--config", path, *argv])
    return str(caught.value)


YAML = """\
# a comment
model: some/model
dataset: [a.jsonl, b.jsonl]
reward_funcs: accuracy
learning-rate: 1e-6
panel: on
report_to: none
gradient_checkpointing: yes
max_length:
vllm_server_port: [8000, 8001]
system: "none of it: 1"
"""

TOML = """\
model = "some/model"
dataset = ["a.jsonl", "b.jsonl"]
reward_funcs = "accuracy"
learning-rate = 1e-6
panel = "on"
report_to = ["none"]
gradient_checkpointing = true
max_length = "none"
vllm_server_port = [8000, 8001]
system = "none of it: 1"
"""


def check(config: TrainConfig) -> None:
    assert config.model.model == "some/model"
    assert config.data.dataset == ("a.jsonl", "b.jsonl")
    assert config.rewards.reward_funcs == ("accuracy",)
    assert config.optimizer.learning_rate == 1e-6
    assert config.logging.panel == "on"
    assert config.logging.report_to == ("none",)
    assert config.model.gradient_checkpointing is True
    assert config.data.max_length is None
    assert config.servers.vllm_server_port == (8000, 8001)
    assert config.data.system == "none of it: 1"
    assert {"learning_rate", "max_length"} <= config.given


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.yml", YAML), ("c.toml", TOML)])
def test_values_are_read_like_those_of_the_command_line(tmp_path: Path, name: str, text: str) -> None:
    check(parse_train(["--config", write(tmp_path, name, text)]))
    check(parse_train([f"--config={write(tmp_path, name, text)}"]))


def test_the_command_line_wins_whatever_the_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", "model: m\nmax-model-len: 100\nport: 1\n")
    parsed = ROLLOUT.parse(["--port", "2", "--config", path, "--vllm_max_model_len", "50"])
    assert (parsed.values["port"], parsed.values["max_model_len"], parsed.values["model"]) == (2, 50, "m")


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    assert ROLLOUT.parse(["--model", "m", "--config", write(tmp_path, "c.yaml", "")]).given == {"model"}


def test_an_empty_list_is_an_empty_list(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", YAML + "val_dataset: []\n")
    assert parse_train(["--config", path]).data.val_dataset == ()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("learning_rat: 1\n", "line 12: learning_rat is not a flag of outrider train: did you mean --learning_rate?"),
        ("top_p: 2\n", "line 12: top_p is '2': expected a finite number > 0 and <= 1"),
        ("seed: [1, 2]\n", "line 12: seed takes one value, found 2: 1 2"),
        ("seed: []\n", "line 12: seed needs a value: an integer >= 0"),
        ("seed:\n", "line 12: seed is 'null': expected an integer >= 0"),
        ("loss:\n  beta: 1\n", "line 12: loss holds a table"),
        ("val_dataset: [[a]]\n", "line 12: val_dataset holds a table or a list of lists"),
        ("config: other.yaml\n", "a file cannot name another one"),
        ("learning_rate: 1e-5\n", "line 5: learning-rate 1e-6"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_mistakes_in_yaml_name_file_and_line(tmp_path: Path, extra: str, message: str) -> None:
    path = write(tmp_path, "c.yaml", YAML + extra)
    found = problem(path)
    assert path in found
    assert message in found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("learning_rat = 1\n", "learning_rat is not a flag of outrider train: did you mean --learning_rate?"),
        ("[loss]\nbeta = 1\n", "loss holds a table"),
        ("top_p = 2.0\n", "top_p is '2.0': expected a finite number > 0 and <= 1"),
        ("top_p = \n", "is not valid TOML"),
    ],
)
def test_mistakes_in_toml_name_the_file(tmp_path: Path, extra: str, message: str) -> None:
    path = write(tmp_path, "c.toml", TOML + extra)
    found = problem(path)
    assert path in found
    assert message in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problem(str(tmp_path / "absent.yaml"))
    assert "cannot be read" in problem(str(tmp_path) + "/c.yaml/x.yaml")
    assert "expected a name that ends in .yaml, .yml or .toml" in problem(write(tmp_path, "c.ini", ""))
    assert "found a sequence" in problem(write(tmp_path, "list.yaml", "- a\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    assert "is not UTF-8" in problem(str(tmp_path / "bytes.yaml"))


def test_config_takes_one_file_once(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", YAML)
    with pytest.raises(UserError, match="--config is given twice"):
        parse_train(["--config", path, "--config", path])
    with pytest.raises(UserError, match="takes the name of one file, found 2"):
        parse_train(["--config", path, path])
    with pytest.raises(UserError, match="takes the name of one file, found 0"):
        parse_train(["--config", "--seed", "1"])
