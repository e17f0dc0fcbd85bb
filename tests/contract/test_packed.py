"""The collector's form of a completion: arrays as bytes, in MessagePack."""

import json
from typing import Any

import pytest

from outrider.contract import routes
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.generation import PACKED_MEDIA_TYPE
from tests.contract.client import Client, figures

FIELDS: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 5.0, "seed": 3, "n": 6}


@pytest.mark.parametrize("more", [{}, {"stop": ["1", "23"]}, {"ignore_eos": True, "skip_special_tokens": False}])
async def test_it_says_the_same_as_json(client: Client, more: dict[str, Any]) -> None:
    packed, plain = await client.packed(**FIELDS, **more, request_id="mine"), await client.choices(**FIELDS, **more)
    assert packed.id == "mine"
    assert [choice.index for choice in packed.choices] == list(range(6))
    for ours, theirs in zip(packed.choices, plain, strict=True):
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        assert unpack_ints(ours.token_ids).tolist() == theirs.token_ids
        assert unpack_floats(ours.logprobs).tolist() == figures(theirs).token_logprobs
        assert ours.weight_versions == theirs.weight_versions
    generated = sum(len(choice.token_ids or []) for choice in plain)
    assert packed.usage.prompt_tokens == 3
    assert packed.usage.completion_tokens == generated
    assert packed.usage.total_tokens == 3 + generated


@pytest.mark.parametrize("more", [{"logprobs": 1}, {"logprobs": None}, {"return_token_ids": False}, {"stream": True}])
async def test_what_it_cannot_hold_is_answered_as_ever(client: Client, more: dict[str, Any]) -> None:
    body = json.dumps({"prompt": [5], "logprobs": 0, "return_token_ids": True, **more}).encode()
    async with client.session.post(routes.COMPLETIONS, data=body, headers={"Accept": PACKED_MEDIA_TYPE}) as answer:
        assert answer.status == 200
        assert answer.content_type == ("text/event-stream" if "stream" in more else "application/json")


async def test_errors_are_json(client: Client) -> None:
    headers = {"Accept": PACKED_MEDIA_TYPE}
    status, error = await client.refusal(b'{"prompt": [5], "n": 0}', headers=headers)
    assert (status, error.param) == (400, "n")
