"""From a model directory or hub id to the facts of an engine, and to the model of a replica."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from outrider import __version__
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig
from outrider.server.model_facts import (
    context_limit,
    declared_stops,
    load_config,
    server_info,
    serving_dtype,
    stop_tokens,
    usable_cores,
    weight_bytes,
)
from outrider.server.torch_engine.attention import ATTENTION_NAME
from outrider.server.torch_engine.cache import BLOCK, position_bytes, round_positions
from outrider.server.torch_engine.messages import ReplicaSpec

#: Tokens of one engine step of all replicas, unless --max_num_batched_tokens says otherwise.
STEP_TOKENS = 2048
#: Share of --kv_cache_gib that keeps the keys and values of ended sequences.
PREFIX_SHARE = 0.2
#: On the CPU, models of up to so many bytes of weights are served by one single-threaded replica a core: their matrix
#: products are too small to be shared by threads, and their weights stay in the caches of every core.
SMALL_MODEL_BYTES = 256 * 2**20


@dataclass(frozen=True)
class EnginePlan:
    """An engine as it is to be: what it says of itself, and its replicas."""

    info: ServerInfo
    dtype: torch.dtype
    replicas: tuple[ReplicaSpec, ...]


def plan_engine(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> EnginePlan:
    """Work out everything that can be known before a model is loaded. Raises UserError for what the user can mend."""
    model_config = load_config(config.model)
    declared = declared_stops(config.model)
    text_config = model_config.get_text_config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = serving_dtype(config.torch_dtype, device)
    limit = context_limit(config, text_config)
    count = replica_count(config, text_config, dtype, device)
    slots = -(-config.max_num_seqs // count)
    positions, blocks = cache_size(config, text_config, limit, dtype, count)
    replicas = tuple(
        ReplicaSpec(
            name=f"replica {index}",
            model=config.model,
            dtype=str(dtype).removeprefix("torch."),
            device=f"cuda:{index}" if device == "cuda" else "cpu",
            threads=replica_threads(config, count) if device == "cpu" else 0,
            max_model_len=limit,
            max_num_seqs=slots,
            max_num_batched_tokens=max((config.max_num_batched_tokens or STEP_TOKENS) // count, slots + 16),
            cache_positions=positions,
            prefix_blocks=blocks if config.enable_prefix_caching else 0,
            stop_tokens=tuple(sorted(stop_tokens(declared, tokenizer.eos_token_id))),
        )
        for index in range(count)
    )
    info = server_info(
        config,
        model_config,
        tokenizer,
        engine="torch",
        engine_version=__version__,
        torch_dtype=str(dtype).removeprefix("torch."),
        max_model_len=limit,
        max_num_seqs=slots * count,
    )
    return EnginePlan(info, dtype, replicas)


def load_model(spec: ReplicaSpec) -> PreTrainedModel:
    """The model of a replica, ready for inference. Raises UserError."""
    transformers_logging.disable_progress_bar()
    dtype: torch.dtype = getattr(torch, spec.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {spec.model}: cannot be loaded: {error}") from error
    return model.to(torch.device(spec.device)).eval().requires_grad_(False)  # type: ignore[arg-type]


def replica_count(config: RolloutConfig, model_config: PreTrainedConfig, dtype: torch.dtype, device: str) -> int:
    """--data_parallel_size, or what is best here. Raises UserError for more replicas than GPUs."""
    asked = config.data_parallel_size
    if device == "cuda":
        if asked is not None and asked > torch.cuda.device_count():
            raise UserError(
                f"--data_parallel_size {asked}: only {torch.cuda.device_count()} GPUs are visible, and a replica needs "
                "one of its own"
            )
        return asked or 1
    if asked is not None:
        return asked
    small = weight_bytes(model_config, dtype) <= SMALL_MODEL_BYTES
    return (config.threads or usable_cores()) if small else 1


def replica_threads(config: RolloutConfig, count: int) -> int:
    """CPU threads of one of ``count`` replicas."""
    return max(1, (config.threads or usable_cores()) // count)


def cache_size(
    config: RolloutConfig, model_config: PreTrainedConfig, limit: int, dtype: torch.dtype, count: int
) -> tuple[int, int]:
    """Positions of one replica's cache and blocks of its prefix cache, from --kv_cache_gib. Raises UserError when
    it does not hold the longest sequence."""
    each = position_bytes(model_config, dtype)
    budget = config.kv_cache_gib * 2**30 / count
    share = PREFIX_SHARE if config.enable_prefix_caching else 0.0
    positions = int(budget * (1 - share) // each)
    # The cache is never larger than every slot at its longest.
    most = -(-config.max_num_seqs // count) * round_positions(limit)
    if positions < round_positions(limit):
        needed = count * each * round_positions(limit) / (1 - share) / 2**30
        raise UserError(
            f"--kv_cache_gib {config.kv_cache_gib:g}: one sequence of {limit} tokens on each of {count} replicas needs "
            f"{needed:.2f} GiB; raise it or lower --max_model_len"
        )
    positions = min(positions, most)
    return positions, min(int(budget * share // (each * BLOCK)), 2 * positions // BLOCK)
