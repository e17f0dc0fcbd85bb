"""Random models for measuring speed: shapes that matter, weights that do not."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import outrider.demo

#: The demo's start model, and its tokenizer.
DEMO_MODEL = Path(outrider.demo.__file__).parent / "model"


def save_bench_model(directory: Path) -> Path:
    """A Qwen3 of 4.8 million parameters with the demo's tokenizer. It has no end-of-text token, so that every
    completion is as long as asked for on every engine."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    return directory
