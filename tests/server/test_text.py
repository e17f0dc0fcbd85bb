"""Texts to tokens, tokens to texts, and the same text in a stream as in one piece."""

import asyncio
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.chat import ChatRequest
from outrider.contract.errors import UserError
from outrider.server.detokenizer import REPLACEMENT
from outrider.server.engine import InvalidRequest
from outrider.server.text import HUGE_TEXT, TextCodec, load_text
from tests.server.models import DEMO_MODEL
from tests.server.vocabularies import KINDS, byte_level, codec

#: More than any vocabulary here: models have ids that their tokenizer does not know.
IDS = st.lists(st.integers(0, 420), max_size=60)


def stream(text: TextCodec, ids: list[int], skip_special: bool) -> list[str]:
    detokenizer = text.detokenizer(skip_special)
    return [*map(detokenizer.push, ids), detokenizer.rest()]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=IDS, skip_special=st.booleans())
def test_a_stream_says_what_the_whole_says(kind: str, ids: list[int], skip_special: bool) -> None:
    """Whatever a model samples: of texts that no tokenizer would give in this way, too."""
    assert "".join(stream(codec(kind), ids, skip_special)) == codec(kind).decode(ids, skip_special)


@pytest.mark.parametrize("kind", ["byte level", "demo"])
@given(ids=IDS, skip_special=st.booleans())
def test_the_text_is_that_of_the_tokenizer(kind: str, ids: list[int], skip_special: bool) -> None:
    """Broken characters included."""
    expected = codec(kind).tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert codec(kind).decode(ids, skip_special) == expected


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@given(text=st.text(max_size=30))
def test_no_part_of_a_character_is_said(kind: str, text: str) -> None:
    tokenizer = codec(kind).tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    said = stream(codec(kind), ids, True)
    assert "".join(said) == tokenizer.decode(ids, skip_special_tokens=True)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in said)


@given(garbage=st.lists(st.integers(0x80, 0xBF), min_size=20, max_size=60), text=st.text("€😀é", min_size=1))
def test_a_character_after_much_garbage_is_whole(garbage: list[int], text: str) -> None:
    """Bytes that are no character are said in the end, without tearing one apart that follows."""
    tokenizer = codec("byte level").tokenizer
    alphabet = {byte[0]: id for id in range(3, 259) if len(byte := codec("byte level").token(id).bytes) == 1}
    ids = [alphabet[byte] for byte in [*garbage, *text.encode()]]
    said = stream(codec("byte level"), ids, True)
    assert "".join(said) == tokenizer.decode(ids) == REPLACEMENT * len(garbage) + text
    assert any(said[:20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_babble_is_said_while_it_goes_on(kind: str) -> None:
    """A model that gives nothing but halves of characters holds nothing back for ever, nor takes ever longer."""
    half = next((id for id in range(3, 259) if codec(kind).token(id).bytes == [0xE2]), 5)
    said = stream(codec(kind), [half] * 200, True)
    assert sum(map(len, said[:100])) > 70
    assert len("".join(said)) == 200


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_tokens_bytes_are_its_own(kind: str) -> None:
    """Together they are the text, though none of them is a character."""
    text = "a€😀"
    ids = codec(kind).tokenizer.encode(text, add_special_tokens=False)
    assert bytes(byte for id in ids for byte in codec(kind).token(id).bytes).decode().strip() == text
    assert {codec(kind).token(id).text for id in ids} >= {"a", REPLACEMENT} or kind == "byte level"


def test_a_token_keeps_its_space() -> None:
    text = codec("byte fallback")
    ids = text.tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "s"])
    assert [text.token(id).text for id in ids] == [" the", " cat", "s"]
    assert text.decode(ids, True) == "the cats"
    assert stream(text, ids, True) == ["the", " cat", "s", ""]


def test_a_special_token_is_written_as_it_is() -> None:
    assert codec("demo").token(1).text == "<eos>"
    assert codec("demo").decode([5, 1], False).endswith("<eos>")


async def test_prompts_short_and_long_are_encoded_alike() -> None:
    text = codec("demo")
    for prompt in ("1+1=", "1+1=" * 2000):
        assert await text.encode(prompt, 128) == text.tokenizer.encode(prompt)
    assert await text.encode("", 128) == []


async def test_a_huge_prompt_is_refused_unseen() -> None:
    with pytest.raises(InvalidRequest, match="prompt: 100001 characters are more than the 128 tokens") as caught:
        await codec("demo").encode("1" * (HUGE_TEXT + 1), 128)
    assert caught.value.param == "prompt"


async def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """While a megabyte is encoded, the event loop turns."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turner = asyncio.create_task(turn())
    await codec("byte level").encode("the cat sat " * 80_000, 10**6)
    turner.cancel()
    assert turns > 100


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools, {{ tools[0].function.name }}\n{% endif %}"
    "{% if mood %}{{ mood }}\n{% endif %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('a tool cannot begin') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def templated(template: str | None = TEMPLATE) -> TextCodec:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return TextCodec(tokenizer)


async def rendered(text: TextCodec, **fields: Any) -> str:
    return text.decode(await text.render(ChatRequest(**{"messages": HELLO, **fields}), 1000), False)


async def test_the_models_template_renders_a_conversation() -> None:
    text = templated()
    assert await rendered(text) == "<user>hello\n<assistant>"
    assert await rendered(text, add_generation_prompt=False) == "<user>hello\n"
    assert await rendered(text, tools=TOOLS) == "<user>hello\n1 tools, add\n<assistant>"
    assert await rendered(text, chat_template_kwargs={"mood": "calm"}) == "<user>hello\ncalm\n<assistant>"
    begun = [*HELLO, {"role": "assistant", "content": "I am"}]
    continued = await rendered(text, messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert continued == "<user>hello\n<assistant>I am"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "tool"}]}, "messages", "a tool cannot begin"),
        ({"messages": [{"role": "user", "content": "no"}], "tools": [{}]}, "messages", "UndefinedError"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt false"),
        ({"chat_template_kwargs": {"chat_template": "mine"}}, "chat_template_kwargs.chat_template", "no variable"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "no variable"),
        ({"chat_template_kwargs": {"messages": []}}, "messages", "TypeError"),
    ],
)
async def test_what_the_template_cannot_do_is_a_bad_request(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        await rendered(templated(), **fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


async def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="has no chat template; ask /v1/completions") as caught:
        await rendered(templated(None))
    assert caught.value.param == "messages"


def test_loading(tmp_path: Any) -> None:
    assert load_text(str(DEMO_MODEL)).decode([5, 6], True)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_text(str(tmp_path))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_text(str(tmp_path))


def test_digits_stay_digits() -> None:
    """Of the demo's tokenizer, character by character."""
    assert codec("demo").decode(codec("demo").tokenizer.encode(string.digits), True) == string.digits
