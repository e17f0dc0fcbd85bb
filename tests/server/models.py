"""Small random models of several architectures, built once per test session."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM as Auto,
)
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import outrider.demo

DEMO_MODEL = Path(outrider.demo.__file__).parent / "model"
_SHAPE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip

CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE),
    "llama": LlamaConfig(**_SHAPE),
    "mistral": MistralConfig(**{**_SHAPE, "num_key_value_heads": 4}, sliding_window=12),
    "olmo2": Olmo2Config(**{name: value for name, value in _SHAPE.items() if name != "head_dim"}),
    "gemma2": Gemma2Config(
        **_SHAPE, sliding_window=8, attn_logit_softcapping=20.0, final_logit_softcapping=15.0, query_pre_attn_scalar=32
    ),
    "gemma3": Gemma3TextConfig(**_SHAPE, sliding_window=8, query_pre_attn_scalar=32, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"]),
}  # fmt: skip


def save_model(kind: str, directory: Path) -> Path:
    """A random model of ``kind`` with the demo's tokenizer."""
    torch.manual_seed(0)
    Auto.from_config(CONFIGS[kind], dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory


def save_endless_model(directory: Path, seed: int = 0) -> Path:
    """A random Llama for up to 4096 positions that never ends a text of its own accord, with the demo's tokenizer.

    Dimension 0 of the residual stream is 1 throughout, since no layer writes to it, and the end-of-text token's
    logit is a large negative multiple of it: requests are in flight for as long as a test wants them to be.
    """
    torch.manual_seed(seed)
    shape = {**_SHAPE, "max_position_embeddings": 4096, "num_hidden_layers": 2}
    model = Auto.from_config(LlamaConfig(**shape), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[shape["eos_token_id"]] = 0.0
        model.lm_head.weight[shape["eos_token_id"], 0] = -1000.0
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory
