import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from outrider.cli import launch, rollout, swift
from outrider.cli.rollout import ROLLOUT
from outrider.cli.swift_flags import ROLLOUT_FLAGS, TRAIN_FLAGS
from outrider.cli.train_config import TRAIN
from outrider.collector.config import CollectorSpec
from outrider.server.vllm_engine.further_arguments import SEVERAL_TOKENS

RLHF = "rlhf --rlhf_type grpo --model m --dataset d.jsonl --reward_funcs accuracy --train_type full"

#: The two lists of ms-swift's flags that its users pass.
ROLLOUT_PAGE = """
    model model_type model_revision torch_dtype adapters host port vllm_tensor_parallel_size vllm_data_parallel_size
    vllm_pipeline_parallel_size vllm_gpu_memory_utilization vllm_max_model_len vllm_max_num_seqs vllm_enforce_eager
    vllm_enable_prefix_caching vllm_disable_custom_all_reduce vllm_quantization vllm_speculative_config
    vllm_limit_mm_per_prompt vllm_engine_kwargs vllm_enable_lora vllm_max_lora_rank vllm_use_async_engine
    vllm_enable_expert_parallel multi_turn_scheduler max_turns use_gym_env gym_env external_plugins template system
    max_length agent_template enable_thinking response_prefix log_level tensor_parallel_size data_parallel_size
"""
TRAIN_PAGE = """
    num_generations temperature top_p top_k min_p repetition_penalty stop_words max_completion_length
    structured_outputs_regex num_generations_eval per_device_train_batch_size gradient_accumulation_steps
    steps_per_generation generation_batch_size num_iterations async_generate max_turns multi_turn_scheduler
    vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout vllm_server_group_port
    enable_flattened_weight_sync move_model_batches loss_type beta epsilon epsilon_high delta
    importance_sampling_level advantage_estimator scale_rewards kl_in_reward rollout_importance_sampling_mode
    rollout_importance_sampling_threshold off_policy_sequence_mask_delta overlong_filter dynamic_sample
    max_resample_times top_entropy_quantile sync_ref_model ref_model_sync_steps ref_model_mixup_alpha reward_funcs
    reward_weights reward_model reward_model_plugin log_completions log_entropy log_rollout_offpolicy_metrics report_to
    logging_steps learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm num_train_epochs max_steps
    save_steps save_total_limit eval_steps output_dir seed dataset val_dataset split_dataset_ratio max_length train_type
    tuner_type lora_rank lora_alpha target_modules deepspeed torch_dtype gradient_checkpointing resume_from_checkpoint
    attn_impl padding_free system external_plugins rlhf_type use_vllm vllm_mode model_type template adapters
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was served or trained."""
    found: list[Any] = []
    for name in ("RANK", "WORLD_SIZE", "NNODES", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for module, function in (("outrider.server.launch", "serve"), ("outrider.trainer.run", "train")):
        stub = ModuleType(module)
        setattr(stub, function, lambda *arguments: found.extend(arguments) or 0)
        monkeypatch.setitem(sys.modules, module, stub)
    return found


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = swift.main(line.split())
    return status, capsys.readouterr().err.splitlines()


def test_the_tables_hold_just_what_ours_lacks() -> None:
    for flags, table, page in ((ROLLOUT, ROLLOUT_FLAGS, ROLLOUT_PAGE), (TRAIN, TRAIN_FLAGS, TRAIN_PAGE)):
        known = {name for flag in flags.flags.values() for name in (flag.name, *flag.aliases)}
        assert not known & table.keys()
        assert set(page.split()) <= known | table.keys()


@pytest.mark.parametrize("table", [ROLLOUT_FLAGS, TRAIN_FLAGS])
def test_reasons_are_one_short_line(table: dict[str, swift.SwiftFlag]) -> None:
    for flag in table.values():
        assert flag.reason
        assert "\n" not in flag.reason
        assert len(flag.reason) <= 100


def test_rollout(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rollout --model Qwen/Qwen3-8B", capsys) == (0, [])
    assert started[0].model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("flag", ["tensor_parallel_size", "vllm_tensor_parallel_size"])
def test_both_spellings_of_parallel_sizes(
    flag: str, started: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "vllm_version", lambda: "0.32.0")
    assert run(f"rollout --model m --{flag} 2", capsys) == (0, [])
    assert (started[0].engine, started[0].tensor_parallel_size) == ("vllm", 2)
    monkeypatch.setattr(rollout, "vllm_version", lambda: None)
    status, (message,) = run(f"rollout --model m --{flag} 2", capsys)
    assert status == 2
    assert message.startswith("swift: --tensor_parallel_size 2:")


def test_rlhf(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--use_vllm true --vllm_mode server --vllm_server_host 10.0.0.1 --vllm_server_port 8001 "
        "--vllm_server_timeout 300 --async_generate true --torch_dtype bfloat16 --learning_rate 1e-6"
    )
    assert run(f"{RLHF} {line}", capsys) == (0, [])
    trainer, encoded, _ = started
    collector = msgspec.msgpack.decode(encoded, type=CollectorSpec)
    assert collector.servers.vllm_server_timeout == 300
    assert collector.server_urls == ["http://10.0.0.1:8001"]
    assert (trainer.max_staleness, collector.max_staleness) == (1, 1)


def test_harmless_flags_are_reported_in_a_line_each(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(f"{RLHF} --deepspeed zero3 --move-model-batches=16 --padding_free", capsys)
    assert status == 0
    assert [line.split(":")[1] for line in lines] == [
        " --deepspeed zero3 is not used",
        " --move-model-batches 16 is not used",
        " --padding_free is not used",
    ]
    assert lines[0].endswith("FSDP2 shards over all processes, as ZeRO-3 does; --fsdp_cpu_offload true offloads")


def test_flags_that_would_give_another_run_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(f"{RLHF} --lora_rank 8 --multi_turn_scheduler x --kl_in_reward --deepspeed zero3", capsys)
    assert status == 2
    assert [line.split(" is refused")[0] for line in lines] == [
        "swift: --lora_rank 8",
        "swift: --multi_turn_scheduler x",
        "swift: --kl_in_reward",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        "--kl_in_reward false",
        "--min_p 0",
        "--repetition_penalty 1.0",
        "--top_entropy_quantile 1.0",
        "--max_turns 1",
        "--adapters none",
        "--sync_ref_model false",
        "--overlong_filter no",
        "--advantage_estimator grpo",
    ],
)
def test_values_that_ask_for_what_happens_anyway_pass(
    flags: str, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{RLHF} {flags}", capsys) == (0, [])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--train_type lora", "--train_type lora is refused"),
        ("--tuner_type lora", "--tuner_type lora is refused"),
        ("--adapters a b", "--adapters a b is refused"),
        ("--loss_type cispo", "--loss_type is 'cispo'"),
        ("--dataset a b#100", "--dataset b#100"),
        ("--dataset HF::a", "--dataset HF::a"),
        ("--val_dataset v#5", "--val_dataset v#5"),
        ("--vllm_mode colocate", "--vllm_mode colocate"),
        ("--reward_model r", "--reward_model r is refused"),
        ("--bogus 1", "--bogus is not a flag"),
        ("--importance_sampling_level sequence_token", "--importance_sampling_level is 'sequence_token'"),
    ],
)
def test_what_rlhf_cannot_honour(line: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = line.split()[0]
    base = "rlhf --rlhf_type grpo --model m --reward_funcs accuracy"
    base += "" if given == "--dataset" else " --dataset d"
    base += "" if given in ("--train_type", "--tuner_type") else " --train_type full"
    status, lines = run(f"{base} {line}", capsys)
    assert status == 2
    assert any(message.startswith(f"swift: {part}") for message in lines), lines


@pytest.mark.parametrize(
    "flags",
    [
        "--vllm_quantization fp8",
        "--adapters a",
        "--vllm_pipeline_parallel_size 2",
        "--multi_turn_scheduler x",
        "--model_revision main",
        "--vllm_enable_lora",
        '--vllm_speculative_config {"method":"ngram"}',
        '--vllm_limit_mm_per_prompt {"image":1}',
        "--system text",
    ],
)
def test_what_rollout_cannot_honour(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, (message,) = run(f"rollout --model m {flags}", capsys)
    assert status == 2
    assert f"swift: {flags} is refused: " in message


def test_speculation_is_refused_with_the_reason_of_engine_kwargs(capsys: pytest.CaptureFixture[str]) -> None:
    _, (message,) = run('rollout --model m --vllm_speculative_config {"method":"ngram"}', capsys)
    assert SEVERAL_TOKENS in message


def test_what_rollout_reports(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--vllm_gpu_memory_utilization 0.9 --vllm_enforce_eager true --template qwen3 --vllm_enable_lora false"
    status, lines = run(f"rollout --model m {flags}", capsys)
    assert status == 0
    assert [line.split()[1] for line in lines] == ["--template"], "the others are served, or ask for what is the case"


def test_training_everything_is_said_where_it_was_not_asked_for(
    started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    status, (notice,) = run(RLHF.removesuffix(" --train_type full"), capsys)
    assert status == 0
    assert notice.startswith("swift: --train_type is not given: all weights are trained")


def test_who_starts_processes_leaves_the_notices_to_the_first_of_them(
    started: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(launch, "launch", lambda placement, command: launched.append(command) or 0)
    line = f"{RLHF} --deepspeed zero3"
    assert run(line, capsys) == (0, [])
    assert launched == [["outrider.cli.swift", *line.split()]]
    assert len(run(f"{line} --dry_run", capsys)[1]) == 1
    for rank, lines in (("0", 1), ("1", 0)):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        status, said = run(line, capsys)
        assert (status, len(said)) == (0, lines)


@pytest.mark.parametrize("kind", ["--rlhf_type dpo", "--rlhf_type ppo grpo", ""])
def test_other_kinds_of_rlhf(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, (message,) = run(f"rlhf {kind} --model m", capsys)
    assert status == 2
    assert "give --rlhf_type grpo" in message


@pytest.mark.parametrize("command", ["sft", "deploy", "rollouts"])
def test_other_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, (message,) = run(f"{command} --model m", capsys)
    assert status == 2
    assert "'swift rollout ...' and 'swift rlhf --rlhf_type grpo ...'" in message


def test_a_file_of_ms_swift_flags(tmp_path: Path, started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text(
        "rlhf_type: grpo\nmodel: m\ndataset: [d]\nreward_funcs: [accuracy]\ntrain_type: full\ndeepspeed: zero2\n"
        "adapters: []\n"
    )
    status, lines = run(f"rlhf --config {path}", capsys)
    assert status == 0
    assert [line.split(" is not used")[0] for line in lines] == [f"swift: {path}, line 6: deepspeed zero2"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("", "--help", "rollout --help", "rlhf --help"):
        assert swift.main(line.split()) == 0
        assert capsys.readouterr().out.startswith("usage: ")
