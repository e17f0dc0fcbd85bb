"""Tokenizers of the kinds that models have, made here: nothing is downloaded."""

import functools
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outrider.server.text import TextCodec
from tests.server.models import DEMO_MODEL

_SAMPLE = [
    "the cat sat on the mat",
    "größer wörter, déjà vu",
    "日本語のテキスト",
    "😀 😁 🦄 € ☃",
    "def f(x):\n    return x",
] * 30
_SPECIAL = ["<pad>", "<eos>", "<unk>"]


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen: every byte has a token, so that characters come in parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SAMPLE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2 and Gemma: words begin with a mark for their space, and bytes stand for rare characters."""
    words = ["▁", "▁the", "▁cat", "cat", "the", "▁a", "é", "s", "a", "b"]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def demo() -> PreTrainedTokenizerFast:
    """Of the demo: one token a character."""
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "demo": demo,
}


@functools.cache
def codec(kind: str) -> TextCodec:
    """The codec over one of ``KINDS``."""
    return TextCodec(KINDS[kind]())
