"""What a server refuses, in which words, and that nobody else notices."""

import asyncio
import json
from typing import Any

import pytest

from outrider.contract import routes
from tests.contract.client import Client
from tests.contract.servers import Server

HUGE = 10**30

#: Fields beside a sound prompt (or instead of it), the field that the error names, and some of its words.
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 2}, "best_of", "unknown"),
    ({"max_token": 2}, "max_token", "unknown"),
    ({"max_tokens": "many"}, "max_tokens", "int"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": 1.5}, "max_tokens", "int"),
    ({"max_tokens": 127}, "max_tokens", "limit of 128"),
    ({"max_tokens": HUGE}, "max_tokens", ""),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"temperature": 101}, "temperature", "<= 100"),
    ({"temperature": None}, "temperature", "null"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_p": 1.1}, "top_p", "<= 1"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"top_k": HUGE}, "top_k", ""),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 1025}, "n", "<= 1024"),
    ({"n": True}, "n", "int"),
    ({"seed": -1}, "seed", ">= 0"),
    ({"seed": 2**63}, "seed", ""),
    ({"stop_token_ids": [99]}, "stop_token_ids", "outside the vocabulary"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "outside the vocabulary"),
    ({"stop_token_ids": [HUGE]}, "stop_token_ids", "outside the vocabulary"),
    ({"stop_token_ids": list(range(50))}, "stop_token_ids", "50 given"),
    ({"logprobs": 5}, "logprobs", "<= 0"),
    ({"stream": True}, "stream", ""),
    ({"return_token_ids": 1}, "return_token_ids", "bool"),
    ({"model": "another"}, "model", "'another'"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [5, 99]}, "prompt", "token id 99"),
    ({"prompt": [5, -1]}, "prompt", "token id -1"),
    ({"prompt": [HUGE]}, "prompt", str(HUGE)),
    ({"prompt": [5] * 200}, "max_tokens", "200 tokens"),
    ({"prompt": "1" * 200}, "max_tokens", "200 tokens"),
    ({"prompt": [[5], [6]]}, "prompt", "array"),
    ({"prompt": ["a", "b"]}, "prompt", "str"),
    ({"prompt": None}, "prompt", "null"),
]

#: Bodies that are no request at all.
BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b'"prompt"',
    b'{"prompt": [5]} and more',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b"\x00" * 64,
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS, ids=lambda value: str(value)[:40])
async def test_a_bad_field_is_named(client: Client, fields: dict[str, Any], param: str, words: str) -> None:
    body = json.dumps({"prompt": [5, 6], "max_tokens": 4, **fields}).encode()
    status, error = await client.refusal(body)
    assert status == 400
    assert error.type == "invalid_request_error"
    assert (error.param or "").partition("[")[0] == param
    assert param in error.message
    assert words in error.message


async def test_a_missing_prompt_is_named(client: Client) -> None:
    status, error = await client.refusal(b'{"max_tokens": 4}')
    assert (status, error.param) == (400, "prompt")


@pytest.mark.parametrize("body", BAD_BODIES)
async def test_a_body_that_is_no_request(client: Client, body: bytes) -> None:
    status, error = await client.refusal(body)
    assert (status, error.type) == (400, "invalid_request_error")
    assert error.message


async def test_a_body_that_is_too_large(client: Client) -> None:
    status, error = await client.refusal(b'{"prompt": [5]}' + b" " * (32 * 2**20))
    assert status == 400
    assert "32 MiB" in error.message


async def test_bad_requests_disturb_nobody(client: Client) -> None:
    """A sound request gives the same while every bad one arrives, and the server goes on."""
    sound = {"prompt": [5, 6, 7], "max_tokens": 100, "temperature": 5.0, "n": 8, "seed": 1}
    alone = await client.choices(**sound)
    bad = [json.dumps({"prompt": [5, 6], "max_tokens": 4, **fields}).encode() for fields, _, _ in BAD_FIELDS]
    crowd, *refusals = await asyncio.gather(
        client.choices(**sound), *(client.refusal(body) for body in bad + BAD_BODIES)
    )
    assert crowd == alone
    assert {status for status, _ in refusals} == {400}
    assert (await client.ask("GET", routes.HEALTH))[0] == 200


async def test_weights_of_another_run_are_not_sampled_from(client: Client) -> None:
    """A server that was restarted, or taken over, must not give a run tokens of weights that are not its own."""
    body = b'{"prompt": [5]}'
    status, error = await client.refusal(body, headers={routes.RUN_HEADER: "my-run"})
    assert status == 409
    assert "my-run" in error.message
    assert (await client.ask("POST", routes.COMPLETIONS, body, {routes.RUN_HEADER: ""}))[0] == 200


async def test_the_served_model_may_be_named(client: Client, server: Server) -> None:
    answer = await client.complete(prompt=[5], model=str(server.model))
    assert answer.model == str(server.model)
