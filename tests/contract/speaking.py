"""A model to converse with: it talks nonsense, in a tokenizer whose tokens are often but parts of characters."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.server.vocabularies import byte_level

#: Ids of the model; its tokenizer knows fewer, as is common.
VOCABULARY = 420

TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'nobody' %}{{ raise_exception('nobody has no say') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood %}({{ mood }}) {% endif %}{% endif %}"
)


def save_speaking_model(directory: Path) -> Path:
    """A random model of up to 512 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, eos_token_id=1, pad_token_id=0,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory
