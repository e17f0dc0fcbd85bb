"""From a model directory or hub id to an embedded engine."""

import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from outrider import __version__
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.identity import SPECIAL_TOKENS, host_identity, model_fingerprint, tokenizer_hash
from outrider.contract.options import DTypeChoice
from outrider.server.config import RolloutConfig
from outrider.server.torch_engine.attention import ATTENTION_NAME
from outrider.server.torch_engine.cache import slot_bytes
from outrider.server.torch_engine.engine import TorchEngine

#: Context of a model that was made for more, unless --max_model_len says otherwise.
DEFAULT_CONTEXT = 4096


def load_engine(config: RolloutConfig, key: str) -> TorchEngine:
    """Load model and tokenizer and start the engine. Raises UserError for what the user can mend."""
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model_config = AutoConfig.from_pretrained(config.model)
        dtype = serving_dtype(config.torch_dtype, device)
        limit = context_limit(config, model_config)
        slots = slots_that_fit(config, model_config, limit, dtype)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {config.model}: cannot be loaded: {error}") from error
    model = model.to(torch.device(device)).eval().requires_grad_(False)  # type: ignore[arg-type]
    info = ServerInfo(
        engine="torch",
        engine_version=__version__,
        model=config.model,
        model_fingerprint=model_fingerprint(model_config.to_dict()),
        tokenizer_hash=hash_of(tokenizer),
        torch_dtype=str(dtype).removeprefix("torch."),
        max_model_len=limit,
        max_num_seqs=slots,
        vocab_size=model.get_input_embeddings().num_embeddings,
        version=0,
        run_id="",
        host=host_identity(),
        capabilities=("inflight_keep", "weights_shared_memory", "weights_http"),
    )
    return TorchEngine(
        model,
        tokenizer,
        info,
        max_num_batched_tokens=config.max_num_batched_tokens,
        stop_tokens=stop_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id),
        seed=config.seed,
        key=key,
    )


def serving_dtype(choice: DTypeChoice, device: str) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 on the CPU."""
    if choice == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return getattr(torch, choice)


def context_limit(config: RolloutConfig, model_config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence. Raises UserError for more than the model was made for."""
    made_for = getattr(model_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if config.max_model_len is None:
        return min(made_for, DEFAULT_CONTEXT)
    if config.max_model_len > made_for:
        raise UserError(f"--max_model_len {config.max_model_len}: the model was made for at most {made_for} tokens")
    return config.max_model_len


def slots_that_fit(config: RolloutConfig, model_config: PreTrainedConfig, limit: int, dtype: torch.dtype) -> int:
    """Sequences decoded at once: --max_num_seqs, or fewer where --kv_cache_gib does not hold so many whole ones."""
    each = slot_bytes(model_config, limit, dtype)
    fitting = int(config.kv_cache_gib * 2**30 // each)
    if fitting == 0:
        raise UserError(
            f"--kv_cache_gib {config.kv_cache_gib:g}: one sequence of {limit} tokens needs {each / 2**30:.2f} GiB; "
            "raise it or lower --max_model_len"
        )
    return min(config.max_num_seqs, fitting)


def stop_tokens(*declared: int | list[int] | None) -> set[int]:
    """End-of-text tokens that generation configuration and tokenizer declare."""
    stops: set[int] = set()
    for item in declared:
        stops.update(item if isinstance(item, list) else [] if item is None else [item])
    return stops


def hash_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """See :func:`outrider.contract.identity.tokenizer_hash`."""
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    return tokenizer_hash(tokenizer.get_vocab(), special)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))
