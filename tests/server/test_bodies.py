"""Bodies that are not what they should be: the complaint names field, whole range, and what was found."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.chat import ChatRequest
from outrider.contract.control import CommitRequest, StageRequest
from outrider.contract.generation import CompletionRequest
from outrider.server.bodies import MAX_MARKS, decode_body
from outrider.server.engine import InvalidRequest

PROMPT: dict[str, Any] = {"prompt": [5]}
HUGE = 10**30

COMPLAINTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 200}, "temperature", "must be a number between 0 and 100, got 200"),
    ({"temperature": "hot"}, "temperature", 'must be a number between 0 and 100, got "hot"'),
    ({"temperature": None}, "temperature", "must be a number between 0 and 100, got null"),
    ({"top_p": 0}, "top_p", "must be a number greater than 0 and at most 1, got 0"),
    ({"top_k": HUGE}, "top_k", f"must be an integer between -1 and 2147483647, got {HUGE}"),
    ({"seed": 2**63}, "seed", f"must be an integer between 0 and {2**63 - 1} or null, got {2**63}"),
    ({"max_tokens": 0}, "max_tokens", "must be an integer of at least 1 or null, got 0"),
    ({"n": 1.5}, "n", "must be an integer between 1 and 1024, got 1.5"),
    ({"echo": True}, "echo", "must be false, got true"),
    ({"best_of": 2}, "best_of", "must be 1 or null, got 2"),
    ({"stream": "yes"}, "stream", 'must be true or false, got "yes"'),
    ({"model": 3}, "model", "must be a text or null, got 3"),
    ({"stop": ""}, "stop", 'must be a text of 1 to 4096 characters or a list of at most 16 items or null, got ""'),
    ({"stop": ["a"] * 17}, "stop", "a list of at most 16 items or null, got a list of 17 items"),
    ({"stop": ["a", ""]}, "stop[1]", 'must be a text of 1 to 4096 characters, got ""'),
    ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]", 'must be an integer, got "a"'),
    ({"logit_bias": {"5": 1, "6": 101}}, "logit_bias", "must be a number between -100 and 100, got 101"),
    ({"logit_bias": [5]}, "logit_bias", "must be an object or null, got a list of 1 items"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "must be true or false, got 1"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "leave it out; the fields are include_usage"),
    ({"max_token": 5}, "max_token", "unknown field; did you mean max_tokens?"),
    ({"response_format": {}}, "response_format", "unknown field; leave it out; the fields are model, n,"),
    ({"prompt": ["a", "b"]}, "prompt[0]", 'must be an integer, got "a"'),
    ({"prompt": {"a": 1}}, "prompt", "must be a text or a list, got an object"),
    ({"prompt": "x", "user": "u" * 100, "n": "n" * 100}, "n", '"' + "n" * 59 + "…"),
]


@pytest.mark.parametrize(("fields", "param", "words"), COMPLAINTS, ids=lambda value: str(value)[:40])
def test_the_complaint(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(json.dumps({**PROMPT, **fields}).encode())
    assert error.param == param
    assert str(error).startswith(f"{param}: ")
    assert words in str(error)


def refused(data: bytes, kind: type[msgspec.Struct] = CompletionRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode_body(data, kind)
    return caught.value


@pytest.mark.parametrize(
    ("data", "kind", "param", "words"),
    [
        (b"{}", CompletionRequest, "prompt", "prompt: is missing; it must be a text or a list"),
        (b"{}", ChatRequest, "messages", "messages: is missing; it must be a list that is not empty"),
        (b'{"messages": []}', ChatRequest, "messages", "must be a list that is not empty, got a list of 0 items"),
        (b'{"messages": [3]}', ChatRequest, "messages[0]", "must be an object, got 3"),
        (b'{"messages": [{}], "top_logprobs": 21}', ChatRequest, "top_logprobs", "between 0 and 20 or null, got 21"),
        (b'{"run_id": "r", "version": 1, "inflight": "drop"}', CommitRequest, "inflight", '"keep" or "recompute" or'),
        (b'{"manifest": {"run_id": "r"}}', StageRequest, "manifest.version", "is missing; it must be an integer"),
        (b"[]", CompletionRequest, None, "the body: must be an object, got a list of 0 items"),
        (b'"x"', CompletionRequest, None, 'the body: must be an object, got "x"'),
        (b"", CompletionRequest, None, "not JSON in UTF-8"),
        (b'{"prompt": [5]', CompletionRequest, None, "not JSON in UTF-8"),
        (b'{"n": 0, "prompt": nonsense}', CompletionRequest, None, "not JSON in UTF-8"),
        (b'{"n": 0, "prompt": "\xff"}', CompletionRequest, "n", "got 0"),
        (b'{"prompt": "\xff"}', CompletionRequest, None, "not JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', CompletionRequest, None, "not JSON in UTF-8"),
        (b'{"prompt": "a", "temperature": 1e999}', CompletionRequest, "temperature", "between 0 and 100, got 1e999"),
        (b'{"messages": [{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]}", ChatRequest, None, "too deeply"),
        (b'{"messages": [' + b"{}," * MAX_MARKS + b"{}]}", ChatRequest, None, f"reads up to {MAX_MARKS}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_of_all_kinds(data: bytes, kind: type[msgspec.Struct], param: str | None, words: str) -> None:
    error = refused(data, kind)
    assert error.param == param
    assert words in str(error)


def outcome(data: bytes, kind: type[msgspec.Struct]) -> InvalidRequest | None:
    try:
        decode_body(data, kind)
    except InvalidRequest as error:
        return error
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@given(fields=st.data())
def test_whatever_stands_in_a_field_is_taken_or_complained_of(
    kind: type[msgspec.Struct], fields: st.DataObject
) -> None:
    sound: dict[str, Any] = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user"}]}
    name = fields.draw(st.sampled_from(kind.__struct_fields__))
    data = json.dumps({**sound, name: fields.draw(JSON)}).encode()
    error = outcome(data, kind)
    if error is not None:
        assert (error.param or "").startswith(name)
        assert str(error).startswith(f"{error.param}: must be ") or "unknown field" in str(error)


def test_a_long_text_is_read() -> None:
    text = "a, b [c] {d} " * 150_000
    assert decode_body(json.dumps({"prompt": text}).encode(), CompletionRequest).prompt == text
