"""Small random models of several architectures, built once per test session."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig, PretrainedConfig, Qwen3Config

import outrider.demo

DEMO_MODEL = Path(outrider.demo.__file__).parent / "model"
_SHAPE = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip

CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**_SHAPE),
    "llama": LlamaConfig(**_SHAPE),
    "gemma2": Gemma2Config(
        **_SHAPE, sliding_window=8, attn_logit_softcapping=20.0, final_logit_softcapping=15.0, query_pre_attn_scalar=16
    ),
}


def save_model(kind: str, directory: Path) -> Path:
    """A random model of ``kind`` with the demo's tokenizer."""
    torch.manual_seed(0)
    Auto.from_config(CONFIGS[kind], dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory
