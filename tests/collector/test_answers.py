"""Answers in both forms, of servers that add to them, leave things out, or send nonsense."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.collector.answers import BadAnswer, read_answer
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.generation import PACKED_MEDIA_TYPE, PackedChoice, PackedCompletion, Usage, append_version

URL = "http://server"
JSON = "application/json; charset=utf-8"

tokens_with_logprobs = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e4, 0, width=32), st.integers(0, 3)), max_size=40
)


def packed(**fields: Any) -> bytes:
    """An answer with one choice. fields: of that choice."""
    values: dict[str, Any] = {
        "index": 0, "text": "text", "finish_reason": "stop", "token_ids": pack_ints([3, 4]),
        "logprobs": pack_floats([-1.0, -2.0]), "weight_versions": [(1, 2)],
    }  # fmt: skip
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    return msgspec.msgpack.encode(PackedCompletion(id="1", choices=[PackedChoice(**{**values, **fields})], usage=usage))


def plain(**fields: Any) -> bytes:
    """The same in JSON, with all that a stock server adds."""
    values: dict[str, Any] = {
        "index": 0, "text": "text", "finish_reason": "stop", "token_ids": [3, 4], "weight_versions": [[1, 2]],
        "logprobs": {"token_logprobs": [-1.0, -2.0], "tokens": ["a", "b"], "top_logprobs": [{"a": -1.0}, None],
                     "text_offset": [0, 1]},
        "stop_reason": 151645, "prompt_token_ids": None, "prompt_logprobs": None, "routed_experts": None,
    }  # fmt: skip
    answer = {
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "x",
        "usage": {"prompt_tokens": 1, "prompt_tokens_details": None}, "kv_transfer_params": None,
        "choices": [{**values, **fields}],
    }  # fmt: skip
    return msgspec.json.encode(answer)


@given(content=tokens_with_logprobs, text=st.text(st.characters(codec="utf-8")))
def test_both_forms_say_the_same(content: list[tuple[int, float, int]], text: str) -> None:
    tokens, logprobs = [token for token, _, _ in content], [logprob for _, logprob, _ in content]
    versions: list[tuple[int, int]] = []
    for _, _, version in content:
        append_version(versions, version)
    fields = {"text": text, "weight_versions": versions}
    body = packed(token_ids=pack_ints(tokens), logprobs=pack_floats(logprobs), **fields)
    [first] = read_answer(body, PACKED_MEDIA_TYPE, URL)
    [second] = read_answer(
        plain(token_ids=tokens, logprobs={"token_logprobs": logprobs}, **fields), JSON, URL
    )  # fmt: skip
    assert first == second
    assert first.tokens.tolist() == tokens
    assert first.logprobs.tolist() == logprobs
    assert (first.versions, first.text, first.finish_reason, first.server) == (versions, text, "stop", URL)


def test_what_stock_servers_add_does_no_harm() -> None:
    [completion] = read_answer(plain(), JSON, URL)
    assert (completion.tokens.tolist(), completion.logprobs.tolist()) == ([3, 4], [-1.0, -2.0])


@pytest.mark.parametrize("missing", ["token_ids", "logprobs", "weight_versions"])
def test_what_is_left_out_is_told(missing: str) -> None:
    with pytest.raises(BadAnswer, match="http://server left out token ids, log-probabilities or versions"):
        read_answer(plain(**{missing: None}), JSON, URL)


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (packed(token_ids=pack_ints([3])), PACKED_MEDIA_TYPE, "1 tokens with 2 log-probabilities and 2 versions"),
        (packed(weight_versions=[(0, 1), (1, 2)]), PACKED_MEDIA_TYPE, "2 tokens with 2 log-probabilities and 3 vers"),
        (packed(token_ids=b"abc"), PACKED_MEDIA_TYPE, "of a wrong kind: bytes length not a multiple"),
        (plain(token_ids=[3, 2**31]), JSON, "of a wrong kind: signed integer is greater than maximum"),
        (plain(token_ids=[3]), JSON, "1 tokens with 2 log-probabilities and 2 versions"),
    ],
)
def test_what_does_not_fit_is_told(body: bytes, kind: str, reason: str) -> None:
    with pytest.raises(BadAnswer, match=f"http://server sent .*{reason}"):
        read_answer(body, kind, URL)


@pytest.mark.parametrize(("body", "kind"), [(plain(), PACKED_MEDIA_TYPE), (packed(), JSON), (b"", JSON)])
def test_what_is_no_answer_at_all(body: bytes, kind: str) -> None:
    with pytest.raises(msgspec.MsgspecError):
        read_answer(body, kind, URL)


def test_extreme_log_probabilities_survive() -> None:
    [completion] = read_answer(packed(logprobs=pack_floats([-math.inf, -0.0])), PACKED_MEDIA_TYPE, URL)
    assert completion.logprobs.tolist() == [-math.inf, 0.0]
