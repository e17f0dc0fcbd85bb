"""Configuration of ``outrider train``: what was given, and what follows from it."""

from collections import Counter

import msgspec

from outrider.cli.batch_plan import plan_batch
from outrider.cli.endpoints import server_urls
from outrider.cli.flags import FlagSet, Parsed
from outrider.cli.swift_flags import TRAIN_FLAGS
from outrider.collector.config import (
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    SamplingConfig,
    ServersConfig,
    StalenessConfig,
)
from outrider.contract.errors import UserError
from outrider.observe.config import LoggingConfig
from outrider.rewards.settings import RewardSettings
from outrider.trainer.config import BatchConfig, CorrectionMode, LossConfig, ModelConfig, OptimizerConfig, RunConfig


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every section of a training run. given: names of the flags that were set, on the line or in the file."""

    model: ModelConfig
    servers: ServersConfig
    data: DataConfig
    sampling: SamplingConfig
    rewards: RewardConfig
    staleness: StalenessConfig
    evaluation: EvaluationConfig
    batch: BatchConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    run: RunConfig
    logging: LoggingConfig
    given: frozenset[str] = frozenset()


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a :class:`TrainConfig` and the number of trainer processes.

    world_size: of them, those of one tensor-parallel group counted once, as the one device that they are here.
    max_staleness: K. rollouts_per_batch = groups_per_batch x num_generations, of which mini_batches are made, with
    steps_per_batch = mini_batches x num_iterations optimizer steps; micro_batches: of one device in an optimizer step,
    unless a token budget forms them. reward_weights: one for each function.
    reward_settings: with soft_max_length set; soft_cache_length is None unless it was given.
    """

    world_size: int
    max_staleness: int
    correction_mode: CorrectionMode
    server_urls: list[str]
    rollouts_per_batch: int
    groups_per_batch: int
    mini_batches: int
    steps_per_batch: int
    micro_batches: int
    epsilon_low: float
    epsilon_high: float
    reward_weights: tuple[float, ...]
    reward_settings: RewardSettings
    warnings: list[str]


TRAIN = FlagSet(
    "outrider train",
    "Trains a model with GRPO on rollouts of servers that 'outrider rollout' started. It is one process for each GPU "
    "that is visible, or NPROC_PER_NODE of them, on each of NNODES nodes; torchrun may start them, too.",
    (
        ModelConfig,
        ServersConfig,
        DataConfig,
        SamplingConfig,
        RewardConfig,
        StalenessConfig,
        EvaluationConfig,
        BatchConfig,
        LossConfig,
        OptimizerConfig,
        RunConfig,
        LoggingConfig,
    ),
    hints={name: f"ms-swift has it; {flag.reason}" for name, flag in TRAIN_FLAGS.items()},
)


def parse_train(argv: list[str]) -> TrainConfig:
    """The configuration that a command line and its ``--config`` file give. UserError where they are wrong."""
    return train_config(TRAIN.parse(argv))


def train_config(parsed: Parsed) -> TrainConfig:
    """The sections of parsed flags."""
    return TrainConfig(
        model=parsed.section(ModelConfig),
        servers=parsed.section(ServersConfig),
        data=parsed.section(DataConfig),
        sampling=parsed.section(SamplingConfig),
        rewards=parsed.section(RewardConfig),
        staleness=parsed.section(StalenessConfig),
        evaluation=parsed.section(EvaluationConfig),
        batch=parsed.section(BatchConfig),
        loss=parsed.section(LossConfig),
        optimizer=parsed.section(OptimizerConfig),
        run=parsed.section(RunConfig),
        logging=parsed.section(LoggingConfig),
        given=parsed.given,
    )


def resolve(config: TrainConfig, world_size: int = 1) -> Resolved:
    """What follows from config. UserError where settings contradict each other or cannot be had."""
    _check_servers(config.servers)
    _check_data(config.data)
    _check_rewards(config)
    if config.sampling.num_generations < 2:
        raise UserError("--num_generations 1: a group needs at least 2 rollouts to be compared; 8 is usual")
    if len(config.sampling.stop_words) > 16:
        raise UserError(f"--stop_words has {len(config.sampling.stop_words)} texts: servers take 16 at most")
    if config.batch.max_steps == 0:
        raise UserError("--max_steps 0: give the number of optimizer steps, or -1 for as long as --num_train_epochs")
    max_staleness = _max_staleness(config.staleness)
    correction = _correction_mode(config, max_staleness)
    plan = plan_batch(config.batch, config.sampling.num_generations, world_size)
    epsilon = config.loss.epsilon
    return Resolved(
        world_size=world_size,
        max_staleness=max_staleness,
        correction_mode=correction,
        server_urls=server_urls(config.servers, config.given),
        rollouts_per_batch=plan.rollouts_per_batch,
        groups_per_batch=plan.groups_per_batch,
        mini_batches=plan.mini_batches,
        steps_per_batch=plan.mini_batches * config.batch.num_iterations,
        micro_batches=plan.micro_batches,
        epsilon_low=epsilon,
        epsilon_high=epsilon if config.loss.epsilon_high is None else config.loss.epsilon_high,
        reward_weights=config.rewards.reward_weights or (1.0,) * len(config.rewards.reward_funcs),
        reward_settings=_reward_settings(config),
        warnings=_warnings(config, correction),
    )


def _check_servers(servers: ServersConfig) -> None:
    start = (
        "start one with 'outrider rollout --model MODEL --port 8000', on GPUs of its own where there are several, "
        "and point the trainer at it with --vllm_mode server --vllm_server_host HOST --vllm_server_port 8000"
    )
    if servers.vllm_mode == "colocate":
        raise UserError(f"--vllm_mode colocate: the engine never shares a process with the trainer here; {start}")
    if not servers.use_vllm:
        raise UserError(f"--use_vllm false: rollouts always come from a server; {start}, without --use_vllm")
    if servers.vllm_server_api_key == "":
        raise UserError("--vllm_server_api_key is empty: give the servers' key, or leave the flag out")


def _check_data(data: DataConfig) -> None:
    if not data.dataset:
        raise UserError("--dataset is empty: name at least one file, directory or hub id")
    if data.val_dataset and data.split_dataset_ratio > 0:
        raise UserError(
            f"--val_dataset {' '.join(data.val_dataset)} and --split_dataset_ratio {data.split_dataset_ratio} both say "
            "what is held out: give one of them"
        )


def _check_rewards(config: TrainConfig) -> None:
    rewards = config.rewards
    names, weights = rewards.reward_funcs, rewards.reward_weights
    if not names:
        raise UserError("--reward_funcs is empty: name at least one reward function")
    if weights and len(weights) != len(names):
        raise UserError(
            f"--reward_weights has {len(weights)} values and --reward_funcs has {len(names)} ({' '.join(names)}): "
            "give one weight for each function"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"--reward_funcs names {twice[0]} twice: name it once and raise its --reward_weights")
    if "max_resample_times" in config.given and not rewards.dynamic_sample:
        raise UserError(
            f"--max_resample_times {rewards.max_resample_times} is for --dynamic_sample true, which is off: "
            "set that too, or leave this out"
        )


def _max_staleness(staleness: StalenessConfig) -> int:
    bound, overlap = staleness.max_staleness, staleness.async_generate
    if overlap is None:
        return bound or 0
    if bound is not None and bound != int(overlap):
        raise UserError(
            f"--max_staleness {bound} and --async_generate {str(overlap).lower()} (which means --max_staleness "
            f"{int(overlap)}) contradict each other: leave out --async_generate"
        )
    return int(overlap)


def _correction_mode(config: TrainConfig, max_staleness: int) -> CorrectionMode:
    mode = config.loss.rollout_importance_sampling_mode
    if mode is None:
        return "token_truncate" if max_staleness > 0 else "none"
    if mode == "none" and "rollout_importance_sampling_threshold" in config.given:
        raise UserError(
            f"--rollout_importance_sampling_threshold {config.loss.rollout_importance_sampling_threshold} and "
            "--rollout_importance_sampling_mode none: without a correction there is no threshold; leave one of them out"
        )
    return mode


def _reward_settings(config: TrainConfig) -> RewardSettings:
    rewards, longest = config.rewards, config.sampling.max_completion_length
    settings = RewardSettings(
        max_completion_length=longest,
        soft_max_length=longest if rewards.soft_max_length is None else rewards.soft_max_length,
        soft_cache_length=rewards.soft_cache_length,
        repetition_n_grams=rewards.repetition_n_grams,
        repetition_max_penalty=rewards.repetition_max_penalty,
    )
    if "soft_overlong" in rewards.reward_funcs:
        settings.soft_lengths()
    return settings


def _warnings(config: TrainConfig, correction: CorrectionMode) -> list[str]:
    """Settings that are allowed but will surprise."""
    found = []
    sampling, given = config.sampling, config.given
    bent = [
        f"--{name} {getattr(sampling, name)}" for name, off in _UNBENT.items() if getattr(sampling, name) not in off
    ]
    if correction != "none" and bent:
        found.append(
            f"{' '.join(bent)} with the correction {correction}: the sampler's log-probabilities are of another "
            "distribution than the trainer's, which biases the ratio (its mean was 0.896 where top_p was 0.8); leave "
            "it out to avoid that"
        )
    if correction == "none" and "rollout_importance_sampling_threshold" in given:
        found.append(
            "--rollout_importance_sampling_threshold has no effect: K is 0, so there is no correction unless "
            "--rollout_importance_sampling_mode names one"
        )
    held_out = config.data.val_dataset or config.data.split_dataset_ratio > 0
    evaluation = sorted(given & set(EvaluationConfig.__struct_fields__))
    if evaluation and not held_out:
        names = ", ".join(f"--{name}" for name in evaluation)
        found.append(f"{names}: nothing is held out, so nothing is evaluated; give --val_dataset or a split")
    for reward, flags in _REWARD_FLAGS.items():
        unused = sorted(given & flags)
        if unused and reward not in config.rewards.reward_funcs:
            names = ", ".join(f"--{name}" for name in unused)
            found.append(f"{names}: no effect, because {reward} is not among --reward_funcs")
    budget = config.batch.max_tokens_per_micro_batch
    if budget is not None and budget < sampling.max_completion_length:
        found.append(
            f"--max_tokens_per_micro_batch {budget} is less than --max_completion_length "
            f"{sampling.max_completion_length}: the longest rollouts exceed the budget on their own"
        )
    return found


#: Sampling flags that make another distribution of the policy's, and the values that do not.
_UNBENT = {
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}
_REWARD_FLAGS = {
    "soft_overlong": {"soft_max_length", "soft_cache_length"},
    "repetition": {"repetition_n_grams", "repetition_max_penalty"},
}
