"""What is known of a model before it is loaded: its configuration, its end-of-text tokens, and who it is."""

import functools
import os

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from outrider.contract.control import EngineName, ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.identity import SPECIAL_TOKENS, host_identity, model_fingerprint, tokenizer_hash
from outrider.contract.options import DTypeChoice
from outrider.server.config import RolloutConfig

#: Context of a model that was made for more, unless --max_model_len says otherwise.
DEFAULT_CONTEXT = 4096

#: What both engines can do.
CAPABILITIES = ("inflight_keep", "inflight_recompute", "inflight_wait", "weights_shared_memory", "weights_http")


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a model. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: cannot be loaded: {error}") from error


def server_info(
    config: RolloutConfig,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    engine: EngineName,
    engine_version: str,
    torch_dtype: str,
    max_model_len: int,
    max_num_seqs: int,
) -> ServerInfo:
    """What a server says of itself."""
    return ServerInfo(
        engine=engine,
        engine_version=engine_version,
        model=config.model,
        model_fingerprint=model_fingerprint(model_config.to_dict()),
        tokenizer_hash=hash_of(tokenizer),
        torch_dtype=torch_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        vocab_size=model_config.get_text_config().vocab_size,
        version=0,
        run_id="",
        host=host_identity(),
        capabilities=CAPABILITIES,
    )


def serving_dtype(choice: DTypeChoice, device: str) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies matrices of it (CUDA, CPUs with AMX), else float32: without
    such units bfloat16 takes twice as long as float32 (measured on AVX-512)."""
    if choice == "auto":
        return torch.bfloat16 if device == "cuda" or has_bfloat16_units() else torch.float32
    return getattr(torch, choice)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU has matrix units for bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported())


def context_limit(config: RolloutConfig, model_config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence. Raises UserError for more than the model was made for."""
    made_for = getattr(model_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if config.max_model_len is None:
        return min(made_for, DEFAULT_CONTEXT)
    if config.max_model_len > made_for:
        raise UserError(f"--max_model_len {config.max_model_len}: the model was made for at most {made_for} tokens")
    return config.max_model_len


def weight_bytes(model_config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Roughly, from the dimensions of a dense decoder."""
    hidden, layers = model_config.hidden_size, model_config.num_hidden_layers
    inner = getattr(model_config, "intermediate_size", 4 * hidden)
    return int((layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * model_config.vocab_size * hidden) * dtype.itemsize)


def sequence_bytes(model_config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Of the keys and values of a sequence, from the dimensions of a dense decoder."""
    heads = model_config.num_attention_heads
    kept = getattr(model_config, "num_key_value_heads", None) or heads
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    return 2 * model_config.num_hidden_layers * kept * size * dtype.itemsize * tokens


def stop_tokens(*declared: int | list[int] | None) -> set[int]:
    """End-of-text tokens that generation configuration and tokenizer declare."""
    stops: set[int] = set()
    for item in declared:
        stops.update(item if isinstance(item, list) else [] if item is None else [item])
    return stops


def declared_stops(model: str) -> int | list[int] | None:
    """End-of-text tokens that a model's files declare."""
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a model without one; its configuration may name a token
        return getattr(AutoConfig.from_pretrained(model), "eos_token_id", None)


def hash_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """See :func:`outrider.contract.identity.tokenizer_hash`."""
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    return tokenizer_hash(tokenizer.get_vocab(), special)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))
