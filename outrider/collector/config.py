"""Configuration of the collector: servers, data, sampling, rewards, staleness, evaluation."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from outrider.contract.control import Inflight
from outrider.contract.options import PositiveInt, Section, option
from outrider.rewards.settings import RewardSettings


class ServersConfig(Section):
    """Where the rollout servers are."""

    use_vllm: Annotated[bool, option("Accepted for ms-swift scripts; rollouts always come from servers")] = True
    vllm_mode: Annotated[
        Literal["server", "colocate"],
        option("Accepted for ms-swift scripts; the engine is always outside the trainer, so colocate is refused"),
    ] = "server"
    vllm_server_host: Annotated[tuple[str, ...], option("Hosts of the rollout servers")] = ("127.0.0.1",)
    vllm_server_port: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=65535)], ...],
        option("Ports of the rollout servers: one for each host, one for all, or several for one host"),
    ] = (8000,)
    vllm_server_base_url: Annotated[
        tuple[str, ...], option("URLs of the rollout servers, such as http://host:8000, instead of hosts and ports")
    ] = ()
    vllm_server_timeout: Annotated[
        float, option("Seconds to wait for a server to come up, or to come back, before giving up", gt=0)
    ] = 240.0
    vllm_server_api_key: Annotated[
        str | None, option("Key of the servers (default: OUTRIDER_API_KEY, else the key kept for this user)")
    ] = None
    weight_host: Annotated[
        str | None,
        option("Address under which servers on other hosts reach this one for weights (default: found by routing)"),
    ] = None
    weight_transport: Annotated[
        Literal["staged", "nccl"],
        option(
            "How weights reach the servers. staged: outrider's servers fetch them beside those in use. nccl: vLLM "
            "servers that were started without outrider get them by vLLM's own routes, and pause for it"
        ),
    ] = "staged"
    max_concurrent_rollouts: Annotated[
        PositiveInt | None, option("Rollouts in flight on one server (default: twice its max_num_seqs)")
    ] = None


class DataConfig(Section):
    """Prompts to train on."""

    dataset: Annotated[
        tuple[str, ...],
        option("JSONL, CSV or Parquet files, a datasets directory, or hub ids; several are concatenated"),
    ]
    val_dataset: Annotated[tuple[str, ...], option("Held-out prompts, in the same forms")] = ()
    split_dataset_ratio: Annotated[
        float, option("Share of the dataset held out for evaluation when there is no --val_dataset", ge=0, lt=1)
    ] = 0.0
    dataset_shuffle: Annotated[bool, option("Shuffle the prompts anew in every epoch")] = True
    max_length: Annotated[
        PositiveInt | None,
        option(
            "Longest prompt in tokens; longer ones are rejected (default: what the servers can take)",
            aliases=("max_prompt_length",),
        ),
    ] = None
    system: Annotated[str | None, option("System message put before chat prompts that have none")] = None
    enable_thinking: Annotated[bool | None, option("Passed to the chat template where given")] = None


class SamplingConfig(Section):
    """How rollouts are sampled."""

    num_generations: Annotated[int, option("Rollouts of a group, that is of one prompt (G)", ge=1)] = 8
    temperature: Annotated[float, option("Sampling temperature", gt=0, le=100)] = 0.9
    top_p: Annotated[float, option("Nucleus sampling; 1 is off", gt=0, le=1)] = 1.0
    top_k: Annotated[int, option("Sample from the k most likely tokens; -1 is off", ge=-1)] = -1
    min_p: Annotated[
        float, option("Sample from tokens at least this share as likely as the likeliest; 0 is off", ge=0, le=1)
    ] = 0.0
    repetition_penalty: Annotated[
        float, option("Makes tokens of prompt and completion less likely; 1 is off", gt=0, le=100)
    ] = 1.0
    presence_penalty: Annotated[
        float, option("Taken once from the logits of tokens of the completion; 0 is off", ge=-2, le=2)
    ] = 0.0
    frequency_penalty: Annotated[
        float, option("Taken from the logits of tokens of the completion for each occurrence; 0 is off", ge=-2, le=2)
    ] = 0.0
    stop_words: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        option("Texts that end a completion, and are cut off its text; 16 at most", aliases=("stop",)),
    ] = ()
    max_completion_length: Annotated[int, option("Longest completion in tokens", ge=1)] = 512


class RewardConfig(Section):
    """How rollouts are scored."""

    reward_funcs: Annotated[
        tuple[str, ...],
        option("Built-in names, pkg.module:function, file.py:function, or names that --external_plugins define"),
    ]
    reward_weights: Annotated[tuple[float, ...], option("One weight for each reward function (default: all 1)")] = ()
    external_plugins: Annotated[tuple[str, ...], option(".py files that define reward functions")] = ()
    reward_timeout: Annotated[float, option("Seconds for one call of a reward function", gt=0)] = 30.0
    reward_workers: Annotated[int, option("Processes that run plain (not async) reward functions", ge=1)] = 1
    soft_max_length: Annotated[PositiveInt | None, option("soft_overlong: length at which the penalty is whole")] = None
    soft_cache_length: Annotated[PositiveInt | None, option("soft_overlong: tokens over which the penalty grows")] = (
        None
    )
    repetition_n_grams: Annotated[int, option("repetition: length of the n-grams", ge=1)] = 3
    repetition_max_penalty: Annotated[float, option("repetition: reward of pure repetition", le=0)] = -1.0
    scale_rewards: Annotated[
        Literal["group", "batch", "none"], option("Divide advantages by the deviation of the group or batch, or not")
    ] = "group"
    dynamic_sample: Annotated[
        bool, option("Replace groups whose rollouts all got one reward by new ones, so that a batch is full of signal")
    ] = False
    max_resample_times: Annotated[
        int, option("dynamic_sample: how many batches' worth of groups may be replaced for one batch", ge=1)
    ] = 3


class StalenessConfig(Section):
    """How far generation may run ahead of training."""

    max_staleness: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        option("K: hard bound on the versions between sampling and training a token, where a version is a trained "
               "batch; 0 is on-policy (default: 0, or 1 with --async_generate)"),
    ] = None  # fmt: skip
    async_generate: Annotated[bool | None, option("ms-swift's name for --max_staleness 1")] = None
    inflight: Annotated[
        Inflight | None,
        option(
            "Rollouts in flight when a server takes new weights: keep: go on with their keys and values; recompute: "
            "make these anew and keep the tokens; wait: end them first, starting no others (default: keep, and "
            "recompute with --weight_transport nccl, which cannot keep)"
        ),
    ] = None
    max_empty_batches: Annotated[
        int, option("Stop after so many batches in a row in which no group had two different rewards", ge=1)
    ] = 20
    request_retries: Annotated[int, option("Tries of one rollout before its group is given up", ge=0)] = 8


class EvaluationConfig(Section):
    """Held-out evaluation, interleaved on the same servers."""

    eval_steps: Annotated[
        int, option("Evaluate every so many steps, at the end of a batch; 0: only before and after", ge=0)
    ] = 0
    eval_on_start: Annotated[bool, option("Evaluate before the first step")] = True
    num_generations_eval: Annotated[int, option("Completions for each held-out prompt", ge=1)] = 1
    eval_temperature: Annotated[float, option("Temperature of evaluation; 0 is greedy", ge=0, le=100)] = 0.0


class CollectorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that the collector process is told at its start, by the command line through the trainer.

    run_id: names this process of the run to the servers. groups_per_batch: groups that are generated together, of
    which mini_batches parts are made, for an optimizer step each. max_staleness: K. ledger: path of the SQLite file.
    resume: whether the ledger may hold an earlier part of the run. drop_zero_variance: groups without two different
    rewards contribute nothing to the gradient (beta is 0).
    """

    run_id: str
    resume: bool
    model: str
    trust_remote_code: bool
    server_urls: list[str]
    servers: ServersConfig
    data: DataConfig
    sampling: SamplingConfig
    rewards: RewardConfig
    reward_weights: tuple[float, ...]
    reward_settings: RewardSettings
    staleness: StalenessConfig
    max_staleness: int
    evaluation: EvaluationConfig
    groups_per_batch: int
    mini_batches: int
    seed: int
    ledger: str
    ledger_keep_steps: int
    drop_zero_variance: bool
