import pytest

from outrider.cli.describe import describe
from outrider.cli.placement import Placement, find_placement
from outrider.cli.train_config import Resolved, parse_train, resolve
from outrider.contract.errors import UserError

BASE = ["--model", "m", "--dataset", "d.jsonl", "--reward_funcs", "accuracy", "format"]


def resolved(line: str, world_size: int = 1) -> Resolved:
    return resolve(parse_train([*BASE, *line.split()]), world_size)


def problem(line: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        resolved(line, world_size)
    return str(caught.value)


def test_defaults() -> None:
    plan = resolved("")
    assert plan == Resolved(
        world_size=1,
        max_staleness=0,
        correction_mode="none",
        server_urls=["http://127.0.0.1:8000"],
        rollouts_per_batch=8,
        groups_per_batch=1,
        mini_batches=1,
        steps_per_batch=1,
        micro_batches=1,
        epsilon_low=0.2,
        epsilon_high=0.2,
        reward_weights=(1.0, 1.0),
        reward_settings=plan.reward_settings,
        warnings=[],
    )
    assert plan.reward_settings.soft_max_length == 512


@pytest.mark.parametrize(
    ("line", "bound", "correction"),
    [
        ("", 0, "none"),
        ("--async_generate true", 1, "token_truncate"),
        ("--async_generate", 1, "token_truncate"),
        ("--async_generate false", 0, "none"),
        ("--async_generate true --max_staleness 1", 1, "token_truncate"),
        ("--async_generate false --max_staleness 0", 0, "none"),
        ("--max_staleness 3", 3, "token_truncate"),
        ("--max_staleness 3 --rollout_importance_sampling_mode none", 3, "none"),
        ("--rollout_importance_sampling_mode sequence_mask", 0, "sequence_mask"),
    ],
)
def test_staleness_and_correction(line: str, bound: int, correction: str) -> None:
    plan = resolved(line)
    assert (plan.max_staleness, plan.correction_mode) == (bound, correction)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--async_generate true --max_staleness 2", ["--max_staleness 2", "--async_generate true"]),
        ("--async_generate true --max_staleness 0", ["--max_staleness 0", "--async_generate true"]),
        ("--async_generate false --max_staleness 1", ["--max_staleness 1", "--async_generate false"]),
        ("--vllm_mode colocate", ["--vllm_mode colocate", "outrider rollout --model"]),
        ("--vllm_mode else", ["--vllm_mode is 'else'", "server, colocate"]),
        ("--use_vllm false", ["--use_vllm false", "outrider rollout --model"]),
        ("--val_dataset v --split_dataset_ratio 0.1", ["--val_dataset v", "--split_dataset_ratio 0.1"]),
        ("--reward_weights 1", ["--reward_weights has 1", "--reward_funcs has 2 (accuracy format)"]),
        ("--reward_weights 1 2 3", ["--reward_weights has 3", "--reward_funcs has 2"]),
        ("--max_resample_times 2", ["--max_resample_times 2", "--dynamic_sample true"]),
        ("--num_generations 1", ["--num_generations 1", "at least 2"]),
        ("--max_steps 0", ["--max_steps 0", "-1"]),
        ("--steps_per_generation 3 --gradient_accumulation_steps 2", ["--steps_per_generation 3", "2 or 4"]),
        ("--vllm_server_api_key=", ["--vllm_server_api_key is empty"]),
        (
            "--rollout_importance_sampling_mode none --rollout_importance_sampling_threshold 3",
            ["--rollout_importance_sampling_threshold 3.0", "--rollout_importance_sampling_mode none"],
        ),
        ("--lr_scheduler_type step", ["--lr_scheduler_type is 'step'", "cosine, linear, constant"]),
        ("--deepspeed zero3", ["--deepspeed is not a flag of outrider train", "FSDP2 shards over all processes"]),
    ],
)
def test_contradictions_name_both_sides_and_the_remedy(line: str, parts: list[str]) -> None:
    message = problem(line)
    assert all(part in message for part in parts), message


def test_a_reward_named_twice() -> None:
    with pytest.raises(UserError, match="names a twice"):
        resolve(parse_train(["--model", "m", "--dataset", "d", "--reward_funcs", "a", "b", "a"]))


def test_nothing_to_train_on_or_for() -> None:
    with pytest.raises(UserError, match="--dataset is empty"):
        resolve(parse_train(["--model", "m", "--dataset", "none", "--reward_funcs", "a"]))
    with pytest.raises(UserError, match="--reward_funcs is empty"):
        resolve(parse_train(["--model", "m", "--dataset", "d", "--reward_funcs", "none"]))
    with pytest.raises(UserError) as caught:
        parse_train([])
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["--model", "--dataset", "--reward_funcs"]


def test_values_that_follow_from_others() -> None:
    plan = resolved("--epsilon 0.1 --epsilon_high 0.3 --reward_weights 0.5 2")
    assert (plan.epsilon_low, plan.epsilon_high, plan.reward_weights) == (0.1, 0.3, (0.5, 2.0))


def test_soft_overlong_asks_for_its_length() -> None:
    line = ["--model", "m", "--dataset", "d", "--reward_funcs", "soft_overlong", "--max_completion_length", "100"]
    with pytest.raises(UserError, match="--soft_cache_length"):
        resolve(parse_train(line))
    settings = resolve(parse_train([*line, "--soft_cache_length", "20"])).reward_settings
    assert settings.soft_lengths() == (100, 20)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--max_staleness 1 --top_p 0.8", "--top_p 0.8 with the correction token_truncate"),
        ("--max_staleness 1 --top_k 5 --min_p 0.1", "--top_k 5 --min_p 0.1 with the correction token_truncate"),
        ("--max_staleness 1 --presence_penalty 0.5", "--presence_penalty 0.5 with the correction token_truncate"),
        ("--async_generate --top_k 20", "--top_k 20 with the correction token_truncate"),
        ("--rollout_importance_sampling_mode token_mask --top_p 0.5", "token_mask"),
        ("--rollout_importance_sampling_threshold 3", "no effect: K is 0"),
        ("--eval_steps 10", "--eval_steps: nothing is held out"),
        ("--soft_cache_length 10", "soft_overlong is not among --reward_funcs"),
        ("--repetition_n_grams 2", "repetition is not among --reward_funcs"),
        ("--max_tokens_per_micro_batch 100", "less than --max_completion_length 512"),
    ],
)
def test_warnings(line: str, part: str) -> None:
    (warning,) = resolved(line).warnings
    assert part in warning


@pytest.mark.parametrize(
    "line",
    [
        "--top_p 0.8",
        "--top_k 20",
        "--max_staleness 1 --top_p 0.8 --rollout_importance_sampling_mode none",
        "--max_staleness 1 --top_p 1 --top_k -1",
        "--eval_steps 10 --val_dataset v",
        "--eval_steps 10 --split_dataset_ratio 0.1",
        "--dynamic_sample --max_resample_times 2",
    ],
)
def test_no_needless_warnings(line: str) -> None:
    assert resolved(line).warnings == []


def test_describe() -> None:
    line = "--per_device_train_batch_size 32 --gradient_accumulation_steps 8 --max_staleness 2 --top_p 0.8"
    config = parse_train([*BASE, *line.split(), "--vllm_server_api_key", "sesame"])
    text = describe(config, resolve(config), Placement(1))
    assert "32 prompts x 8 rollouts = 256 rollouts a batch; 1 optimizer step a batch; 8 micro-batches of 32\n" in text
    assert "\n    1 process\n" in text
    assert "K = 2: at most 3 x 32 groups ahead" in text
    assert "servers: http://127.0.0.1:8000" in text
    assert "warning: --top_p 0.8" in text
    assert "sesame" not in text
    lines = [entry.split() for entry in text.splitlines()]
    assert ["*", "max_staleness", "2"] in lines
    assert ["learning_rate", "1e-06"] in lines


@pytest.mark.parametrize(
    ("line", "world_size", "part"),
    [
        ("--generation_batch_size 64", 2, "8 prompts x 8 rollouts = 64 rollouts a batch; 4 mini-batches of 16 rollouts "
         "= 4 optimizer steps a batch, after which weights are published; "
         "1 micro-batch of 8 on each of 2 devices a step"),
        ("--num_iterations 3 --steps_per_generation 4 --gradient_accumulation_steps 2 --max_steps 13", 1,
         "2 mini-batches of 16 rollouts x 3 iterations = 6 optimizer steps a batch, after which weights are published; "
         "2 micro-batches of 8 a step\n"),
        ("--num_iterations 6 --max_steps 13", 1,
         "length: 13 optimizer steps on 3 batches, the last one for 1 of its 6\n"),
        ("--num_iterations 2 --max_steps 4", 1, "length: 4 optimizer steps on 2 batches\n"),
        ("--max_tokens_per_micro_batch 4096", 1, "micro-batches of up to 4096 tokens"),
        ("", 1, "1 prompt x 8 rollouts = 8 rollouts a batch; 1 optimizer step a batch; 1 micro-batch of 8\n"),
        ("", 1, "K = 0: on-policy; at most 1 group in flight"),
        ("--max_steps 1", 1, "length: 1 optimizer step\n"),
        ("--num_train_epochs 2", 1, "length: 2 epochs\n"),
        ("--reward_weights 0.5 1", 1, "rewards: 0.5 x accuracy, 1 x format"),
    ],
)  # fmt: skip
def test_describe_the_arithmetic(line: str, world_size: int, part: str) -> None:
    config = parse_train([*BASE, *line.split()])
    assert part in describe(config, resolve(config, world_size), Placement(world_size))


def test_describe_tensor_parallelism() -> None:
    config = parse_train([*BASE, "--tensor_parallel_size", "4"])
    placement = find_placement({"NPROC_PER_NODE": "8"})
    text = describe(config, resolve(config, placement.data_size(4)), placement)
    assert "8 processes" in text
    assert "tensor parallelism: 2 groups of 4 processes that compute every layer together" in text
    assert "on each of 2 devices" in text


def test_describe_how_many_processes() -> None:
    config = parse_train(BASE)
    two_nodes = find_placement({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, lambda environment: 8)
    text = describe(config, resolve(config, two_nodes.world_size), two_nodes)
    assert "2 nodes x 8 = 16 processes, this is node 1 (GPUs shown here: 8; NPROC_PER_NODE says otherwise)" in text
    alone = find_placement({"NPROC_PER_NODE": "1"})
    assert "    1 process (NPROC_PER_NODE=1)\n" in describe(config, resolve(config), alone)
