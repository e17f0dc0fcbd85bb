"""From a specification to the parts that the collector process consists of."""

from typing import Any

import msgspec

from outrider.collector.config import CollectorSpec, SamplingConfig
from outrider.collector.preflight import Expected
from outrider.collector.prompts import PromptSet, load_rows, split_rows
from outrider.collector.reward_runner import RewardRunner
from outrider.collector.stock_meeting import TrainerFacts
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.generation import CompletionRequest
from outrider.contract.identity import SPECIAL_TOKENS, model_fingerprint, tokenizer_hash
from outrider.rewards.loading import load_reward

#: A text on which tokenizers differ: words, digits, signs, spaces, another script.
PROBE = "Two  plus 40 is 42, naïve 東京!\n"

#: Rows and the names of their columns.
Source = tuple[Any, list[str]]


def load_identity(spec: CollectorSpec) -> tuple[Any, Expected, TrainerFacts]:
    """Tokenizer of the trainer's model, the fingerprints that servers must have, and what stands in for them where a
    server has none. Raises UserError."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {spec.model}: cannot be loaded: {error}") from error
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    expected = Expected(
        model=spec.model,
        model_fingerprint=model_fingerprint(config.to_dict()),
        tokenizer_hash=tokenizer_hash(tokenizer.get_vocab(), special),
        max_completion_length=spec.sampling.max_completion_length,
        inflight=spec.staleness.inflight or ("recompute" if spec.servers.weight_transport == "nccl" else "keep"),
    )
    text = config.get_text_config()
    facts = TrainerFacts(
        model_fingerprint=expected.model_fingerprint,
        tokenizer_hash=expected.tokenizer_hash,
        torch_dtype="float16" if str(config.dtype) == "torch.float16" else "bfloat16",
        vocab_size=text.vocab_size,
        plain_sampling=_is_plain(spec.sampling),
        probe=(PROBE, tokenizer.encode(PROBE, add_special_tokens=False)),
    )
    return tokenizer, expected, facts


def _is_plain(sampling: SamplingConfig) -> bool:
    """Whether tokens are drawn from the model's own distribution."""
    return (
        sampling.temperature == sampling.top_p == sampling.repetition_penalty == 1
        and sampling.top_k <= 0
        and sampling.min_p == sampling.presence_penalty == sampling.frequency_penalty == 0
    )


def load_sources(spec: CollectorSpec) -> tuple[Source, Source | None]:
    """Rows to train on, and rows held out where there are any. Raises UserError."""
    rows, columns = load_rows(spec.data.dataset, "--dataset")
    if spec.data.val_dataset:
        return (rows, columns), load_rows(spec.data.val_dataset, "--val_dataset")
    if spec.data.split_dataset_ratio > 0:
        rows, held_out = split_rows(rows, spec.data.split_dataset_ratio, spec.seed)
        return (rows, columns), (held_out, columns)
    return (rows, columns), None


def prompt_sets(
    spec: CollectorSpec, tokenizer: Any, sources: tuple[Source, Source | None], infos: list[ServerInfo]
) -> tuple[PromptSet, PromptSet | None]:
    """Training and held-out prompts, limited to what every server can take. Raises UserError."""
    room = min(info.max_model_len for info in infos) - spec.sampling.max_completion_length
    limit = room if spec.data.max_length is None else min(room, spec.data.max_length)
    (rows, columns), held_out = sources
    train = PromptSet(rows, columns, " ".join(spec.data.dataset), tokenizer, spec.data, limit)
    train.check()
    if held_out is None:
        return train, None
    name = " ".join(spec.data.val_dataset) or "the held-out split"
    return train, PromptSet(held_out[0], held_out[1], name, tokenizer, spec.data, limit)


def start_rewards(spec: CollectorSpec, sources: tuple[Source, Source | None]) -> RewardRunner:
    """The reward functions. Raises UserError when one cannot be loaded, or needs a column that the data lacks."""
    rewards = spec.rewards
    for reward_spec in rewards.reward_funcs:
        needed = load_reward(reward_spec, spec.reward_settings, list(rewards.external_plugins)).needed_columns
        for flag, source in zip(("--dataset", "--val_dataset"), sources, strict=True):
            missing = [name for name in needed if source is not None and name not in source[1]]
            if missing and source is not None:
                raise UserError(
                    f"--reward_funcs {reward_spec} needs the column {missing[0]!r}, and {flag} has only "
                    f"{', '.join(source[1])}: rename or add a column, or choose another reward"
                )
    return RewardRunner(
        rewards.reward_funcs,
        spec.reward_settings,
        rewards.external_plugins,
        rewards.reward_timeout,
        rewards.reward_workers,
    )


def sampling_template(spec: CollectorSpec) -> CompletionRequest:
    """Sampling parameters of training rollouts."""
    sampling = spec.sampling
    return CompletionRequest(
        prompt=[],
        n=sampling.num_generations,
        max_tokens=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop=list(sampling.stop_words) or None,
    )


def evaluation_template(spec: CollectorSpec) -> CompletionRequest:
    """Sampling parameters of held-out evaluation: the model's own distribution, without what helps to explore."""
    return msgspec.structs.replace(
        sampling_template(spec),
        n=spec.evaluation.num_generations_eval,
        temperature=spec.evaluation.eval_temperature,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )


def ledger_facts(spec: CollectorSpec, prompts: PromptSet, expected: Expected) -> dict[str, str]:
    """What must be the same for a run to go on with its ledger, also where it has no checkpoint yet."""
    return {
        "model_fingerprint": expected.model_fingerprint,
        "tokenizer_hash": expected.tokenizer_hash,
        "seed": str(spec.seed),
        "dataset": prompts.fingerprint(),
        "dataset_shuffle": str(spec.data.dataset_shuffle).lower(),
        "groups_per_batch": str(spec.groups_per_batch),
        "num_generations": str(spec.sampling.num_generations),
    }
