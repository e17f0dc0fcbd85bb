"""Fingerprints by which a trainer and a server find out whether they hold the same model and tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Configuration fields that say nothing about the function the model computes.
_INCIDENTAL = frozenset(
    {
        "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures",
        "bos_token_id", "eos_token_id", "pad_token_id", "attn_implementation", "_attn_implementation",
        "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
        "_attn_implementation_internal", "_output_attentions", "chunk_size_feed_forward", "id2label", "label2id",
        "problem_type", "is_encoder_decoder",
    }
)  # fmt: skip

#: Names of the special tokens that go into :func:`tokenizer_hash`.
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """Hash of a model configuration (``PretrainedConfig.to_dict()``), less what does not shape the weights."""
    return _digest({key: value for key, value in config.items() if key not in _INCIDENTAL})


def tokenizer_hash(vocabulary: Mapping[str, int], special_ids: Mapping[str, int | None]) -> str:
    """Hash of the token-to-id mapping and of the special tokens' ids."""
    return _digest([sorted(vocabulary.items()), sorted(special_ids.items(), key=lambda item: item[0])])


def host_identity() -> str:
    """Names the memory under /dev/shm: two processes with the same identity share it. Two containers on one kernel
    have one each, unless it is handed to both."""
    boot_id, shared = Path("/proc/sys/kernel/random/boot_id"), Path("/dev/shm")
    try:
        return (
            f"{boot_id.read_text().strip()}-{shared.stat().st_dev:x}"
            if shared.is_dir()
            else boot_id.read_text().strip()
        )
    except OSError:
        import platform
        import uuid

        return f"{platform.node()}-{uuid.getnode():x}"
