"""The model's tokenizer and chat template, as the HTTP application uses them."""

import asyncio
import functools
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from outrider.contract.chat import ChatRequest
from outrider.contract.errors import UserError
from outrider.server.detokenizer import REPLACEMENT, Decode, Detokenizer, detokenize
from outrider.server.engine import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters of a text that is encoded on the event loop; longer ones are encoded on a thread.
SHORT_TEXT = 2000

#: Characters from which on a text is refused unseen if it is longer than the longest tokens would make it. Shorter
#: ones are encoded in any case: a tokenizer may swallow characters.
HUGE_TEXT = 100_000

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText(msgspec.Struct, frozen=True):
    """What one token stands for: its text after other text, and its bytes, which may be no whole character."""

    text: str
    bytes: list[int]


class TextCodec:
    """Texts to tokens and back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from tokenizers.decoders import ByteLevel
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # here: it imports torch

        self.tokenizer = tokenizer
        self._decode_all, self._decode_said = _decoder(tokenizer, False), _decoder(tokenizer, True)
        # Such a decoder makes one text of all bytes, and a stream parts it between characters, broken ones included.
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._takes_nothing_back = isinstance(getattr(backend, "decoder", None), ByteLevel)
        self.special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._byte_characters = {character: byte for byte, character in bytes_to_unicode().items()}
        # Encoding on several threads is safe once a first text has settled truncation and padding.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self._decode_all(self._anchor)
        self._tokens: dict[int, TokenText] = {}
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
        self._template_settings = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}

    async def encode(self, text: str, limit: int) -> list[int]:
        """The tokens of a prompt. limit: tokens that the context holds; more may come back, or InvalidRequest."""
        return await self._encode(text, limit, "prompt", add_special_tokens=True)

    async def render(self, request: ChatRequest, limit: int) -> list[int]:
        """The tokens of a conversation in the model's template. limit: as in :meth:`encode`."""
        # On a thread, since nobody knows how much the template has to do.
        text = await asyncio.to_thread(self._render, request)
        return await self._encode(text, limit, "messages", add_special_tokens=False)

    def detokenizer(self, skip_special: bool) -> Detokenizer:
        """Says the text of one choice as its tokens come."""
        return Detokenizer(self._decoder(skip_special), self.special if skip_special else ())

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of a whole choice: what :meth:`detokenizer` says of it."""
        decode = self._decoder(skip_special)
        if self._takes_nothing_back:
            return decode(ids)
        return detokenize(ids, decode, self.special if skip_special else ())

    def token(self, id: int) -> TokenText:
        """What a token stands for; special tokens and halves of characters, too."""
        known = self._tokens.get(id)
        if known is None:
            known = self._tokens[id] = self._token(id)
        return known

    async def _encode(self, text: str, limit: int, field: str, add_special_tokens: bool) -> list[int]:
        if len(text) > max(HUGE_TEXT, limit * self._longest_token):
            raise InvalidRequest(
                f"{field}: {len(text)} characters are more than the {limit} tokens of this server's limit "
                "(--max_model_len) can hold",
                field,
            )

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

        return encode() if len(text) <= SHORT_TEXT else await asyncio.to_thread(encode)

    def _render(self, request: ChatRequest) -> str:
        if self.tokenizer.chat_template is None:
            raise InvalidRequest(
                "messages: the tokenizer of this model has no chat template; ask /v1/completions, or serve a "
                "directory that holds a chat_template.jinja",
                "messages",
            )
        if request.continue_final_message and request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message: goes with add_generation_prompt false only: a message that is continued is "
                "not followed by a new one",
                "continue_final_message",
            )
        variables = request.chat_template_kwargs or {}
        for name in sorted(variables.keys() & self._template_settings):
            raise InvalidRequest(
                f"chat_template_kwargs.{name}: is no variable of the template; leave it out, or give it as a field "
                "of the request if it is one",
                f"chat_template_kwargs.{name}",
            )
        tools: Any = request.tools  # a list may hold functions for the tokenizer, which JSON does not
        try:
            text = self.tokenizer.apply_chat_template(
                request.messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **variables,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {type(error).__name__}: {error}", "messages"
            ) from error
        return str(text)

    def _decoder(self, skip_special: bool) -> Decode:
        return self._decode_said if skip_special else self._decode_all

    def _token(self, id: int) -> TokenText:
        text = self._decode_all([*self._anchor, id]).removeprefix(self._anchor_text)
        if REPLACEMENT not in text:
            return TokenText(text, list(text.encode()))
        name: Any = self.tokenizer.convert_ids_to_tokens(id)
        if byte := _BYTE_TOKEN.fullmatch(name):
            return TokenText(text, [int(byte[1], 16)])
        if all(character in self._byte_characters for character in name):
            return TokenText(text, [self._byte_characters[character] for character in name])
        return TokenText(text, list(text.encode()))


def _decoder(tokenizer: "PreTrainedTokenizerBase", skip_special: bool) -> Decode:
    """Ids to text. Spaces stay as they are: cleaning them up is for words, and spoils code."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the call below comes to, less a conversion of every id
        return functools.partial(backend.decode, skip_special_tokens=skip_special)
    decode: Any = tokenizer.decode
    return functools.partial(decode, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


def load_text(model: str) -> TextCodec:
    """The tokenizer of a model directory or hub id. Raises UserError when there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return TextCodec(AutoTokenizer.from_pretrained(model))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"--model {model}: its tokenizer cannot be loaded: {error}; the directory needs tokenizer.json and "
            "tokenizer_config.json"
        ) from error
