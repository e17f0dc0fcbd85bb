"""From a spec on the command line to a function, and what a person reads when there is none."""

import importlib.util
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider.contract.errors import UserError
from outrider.rewards.loading import BUILT_IN, Reward, load_reward
from outrider.rewards.settings import RewardSettings

PLUGIN = """
from json import dumps
import asyncio

LOADED = []
LOADED.append(1)
THRESHOLD = 3

def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

async def judge(completions, **columns):
    await asyncio.sleep(0)
    return [None for _ in completions]

class Scaled:
    def __init__(self, factor=2.0):
        self.factor = factor
    def __call__(self, completions, **columns):
        return [self.factor for _ in completions]

class AsyncJudge:
    async def __call__(self, completions, **columns):
        return [1.0 for _ in completions]

class NeedsKey:
    def __init__(self, key):
        self.key = key
    def __call__(self, completions, **columns):
        return []

class NotCallable:
    pass

def _hidden(completions, **columns):
    return []
"""


@pytest.fixture(autouse=True)
def _restore_import_state(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("outrider_plugin_", "own_rewards", "broken")):
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    file = tmp_path / "rewards.py"
    file.write_text(PLUGIN)
    return str(file)


def load(spec: str, plugins: list[str] | None = None, **settings: Any) -> Reward:
    return load_reward(spec, RewardSettings(**settings), plugins or [])


class TestBuiltIn:
    def test_all_of_them_load_and_pickle(self) -> None:
        for name in BUILT_IN:
            reward = load(name, soft_cache_length=64)
            assert (reward.name, reward.is_async) == (name, False)
            assert pickle.loads(pickle.dumps(reward)).name == name

    def test_settings_reach_the_function(self) -> None:
        assert load("repetition", repetition_n_grams=1, repetition_max_penalty=-3.0).function(["a a a"]) == [
            pytest.approx(-2.0)
        ]
        overlong = load("soft_overlong", max_completion_length=100, soft_cache_length=20)
        assert overlong.function(["text"], completion_ids=[[7] * 90], prompts=["p"]) == [-0.5]

    def test_soft_overlong_asks_for_its_length(self) -> None:
        with pytest.raises(UserError, match="needs --soft_cache_length"):
            load("soft_overlong")

    def test_accuracy_without_math_verify_fails_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'outrider\[math\]'"):
            load("accuracy")

    def test_a_misspelt_name_gets_the_nearest_and_all_others(self, plugin: str) -> None:
        with pytest.raises(UserError, match=r"no reward 'acuracy': did you mean 'accuracy'\?") as caught:
            load("acuracy")
        assert all(name in str(caught.value) for name in BUILT_IN)
        with pytest.raises(UserError, match=r"did you mean 'length'\?.*rewards.py defines .*Scaled"):
            load("lenght", [plugin])
        with pytest.raises(UserError, match="no reward ''"):
            load("")


class TestPlugins:
    def test_bare_name(self, plugin: str) -> None:
        reward = load("length", [plugin])
        assert (reward.name, reward.is_async, reward.function(["abc"])) == ("length", False, [3.0])

    def test_file_and_name(self, plugin: str) -> None:
        assert load(f"{plugin}:length").function(["abc"]) == [3.0]

    async def test_async_function_and_object(self, plugin: str) -> None:
        for name, expected in (("judge", [None]), ("AsyncJudge", [1.0])):
            reward = load(name, [plugin])
            assert reward.is_async
            result = reward.function(["abc"])
            assert inspect.isawaitable(result)
            assert await result == expected

    def test_class_is_instantiated(self, plugin: str) -> None:
        assert load("Scaled", [plugin]).function(["abc"]) == [2.0]

    def test_a_file_is_executed_once(self, plugin: str) -> None:
        first, second = load("length", [plugin]).function, load(f"{plugin}:Scaled").function
        module = sys.modules[first.__module__]
        assert type(second).__module__ == first.__module__
        assert module.LOADED == [1]

    def test_neighbouring_files_can_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "own_rewards_helper.py").write_text("VALUE = 5.0\n")
        file = tmp_path / "main.py"
        file.write_text("from own_rewards_helper import VALUE\ndef five(completions, **columns):\n    return [VALUE]\n")
        assert load("five", [str(file)]).function(["x"]) == [5.0]

    def test_two_files_of_the_same_name(self, plugin: str, tmp_path: Path) -> None:
        other = tmp_path / "other" / "rewards.py"
        other.parent.mkdir()
        other.write_text("def short(completions, **columns):\n    return [-1.0]\n")
        assert load("short", [plugin, str(other)]).function(["x"]) == [-1.0]
        assert load("length", [plugin, str(other)]).function(["x"]) == [1.0]

    def test_the_same_file_twice_is_not_ambiguous(self, plugin: str) -> None:
        assert load("length", [plugin, plugin]).name == "length"

    def test_ambiguous_name_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text("def format(completions, **columns):\n    return []\n")
        with pytest.raises(UserError, match=r"ambiguous \(the built-in one, .*own.py:format\): name the file"):
            load("format", [str(file)])
        assert load(f"{file}:format").function(["x"]) == []

    def test_imported_and_private_names_are_not_defined_by_the_plugin(self, plugin: str) -> None:
        for name in ("dumps", "_hidden"):
            with pytest.raises(UserError, match="there is no reward"):
                load(name, [plugin])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "missing",
                "has no 'missing'. It defines: AsyncJudge, NeedsKey, NotCallable, Scaled, judge, length",
            ),
            ("THRESHOLD", "has 'THRESHOLD', but it is not callable: 3"),
            ("NeedsKey", r"NeedsKey\(\) failed.*missing 1 required positional argument: 'key'.*a default"),
            ("NotCallable", "class without __call__"),
        ],
    )
    def test_what_is_no_reward_is_named(self, plugin: str, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load(f"{plugin}:{name}")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("x = 1\nimport own_rewards_nowhere\n", r":2: import own_rewards_nowhere \(ModuleNotFoundError"),
            ("import json\njson.loads('{')\n", r":2: json.loads\('\{'\) \(JSONDecodeError"),
            ("def f(:\n    pass\n", r":1: def f\(: \(SyntaxError"),
            ("raise SystemExit(3)\n", r":1: raise SystemExit\(3\) \(SystemExit: 3\)"),
            (
                "import broken\nbroken.missing\n",
                r"broken.py:2: broken.missing \(AttributeError.*circular import",
            ),
        ],
    )
    def test_a_failing_plugin_shows_its_own_line(self, tmp_path: Path, source: str, message: str) -> None:
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(UserError, match=f"(?s)reward 'length' needs the plugin .*failed to load at .*{message}"):
            load("length", [str(file)])
        assert not [name for name in sys.modules if name.startswith("outrider_plugin_broken")]

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"needs the plugin nowhere\.py, and there is no file"):
            load("length", ["nowhere.py"])
        with pytest.raises(UserError, match="there is no file"):
            load(f"{tmp_path}/nowhere.py:length")
        text = tmp_path / "rewards.txt"
        text.write_text("x")
        with pytest.raises(UserError, match="not a Python file"):
            load("length", [str(text)])


class TestModules:
    def test_from_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "own_rewards"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "length.py").write_text(PLUGIN)
        monkeypatch.chdir(tmp_path)
        reward = load("own_rewards.length:length")
        assert (reward.name, reward.function(["ab"])) == ("length", [2.0])

    def test_from_an_installed_module(self) -> None:
        assert load("json:dumps").name == "dumps"

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("own_rewards_nowhere.sub:f", "there is no module 'own_rewards_nowhere' here: install it"),
            ("json.nowhere:f", "there is no module 'json.nowhere' here"),
            ("json:nowhere", "has no 'nowhere'. It defines: .*dumps"),
            (":f", "is incomplete"),
            ("json:", "is incomplete"),
        ],
    )
    def test_bad_specs(self, spec: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load(spec)

    def test_a_failing_module_shows_its_own_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken_module.py").write_text("x = 1\nimport own_rewards_nowhere\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"broken_module.py:2: import own_rewards_nowhere \(ModuleNotFound"):
            load("broken_module:f")


def test_needed_columns(tmp_path: Path) -> None:
    """What is checked against the data before anything is sampled."""
    plugin = tmp_path / "needy.py"
    plugin.write_text(
        "def score(completions, answer, prompts, weight=1.0, **columns): return [0.0]\n"
        "def anything(*args, **columns): return [0.0]\n"
        "class Judge:\n    async def __call__(self, completions, *, rubric): return [0.0]\n"
    )
    settings = RewardSettings(soft_cache_length=8)

    def needed(spec: str) -> list[str]:
        return load_reward(spec, settings, []).needed_columns

    assert needed(f"{plugin}:score") == ["answer"]
    assert needed(f"{plugin}:anything") == []
    assert needed(f"{plugin}:Judge") == ["rubric"]
    assert [needed(name) for name in ("accuracy", "exact_match")] == [["solution"], ["solution"]]
    assert [needed(name) for name in ("format", "repetition", "soft_overlong")] == [[], [], []]
