"""What a server refuses, in which words, and that nobody else notices."""

import asyncio
import json
from typing import Any

import pytest

from outrider.contract import routes
from outrider.contract.chat import ChatRequest
from outrider.contract.generation import CompletionRequest
from tests.contract.client import Client
from tests.contract.servers import Server

HUGE = 10**30

#: A field of either kind of request, a value that it cannot have, the field that the error names, some of its words.
BAD_FIELDS: list[tuple[str, Any, str, str]] = [
    ("model", "another", "model", "'another' is not served here"),
    ("model", 3, "model", "a text or null, got 3"),
    ("n", 0, "n", "between 1 and 1024, got 0"),
    ("n", 1025, "n", "between 1 and 1024, got 1025"),
    ("n", True, "n", "an integer between 1 and 1024, got true"),
    ("temperature", -0.1, "temperature", "between 0 and 100, got -0.1"),
    ("temperature", 101, "temperature", "between 0 and 100, got 101"),
    ("temperature", "hot", "temperature", 'a number between 0 and 100, got "hot"'),
    ("temperature", None, "temperature", "a number between 0 and 100, got null"),
    ("top_p", 0, "top_p", "greater than 0 and at most 1, got 0"),
    ("top_p", 1.1, "top_p", "greater than 0 and at most 1, got 1.1"),
    ("top_k", -2, "top_k", "between -1 and 2147483647, got -2"),
    ("top_k", HUGE, "top_k", f"between -1 and 2147483647, got {HUGE}"),
    ("min_p", -0.1, "min_p", "between 0 and 1, got -0.1"),
    ("min_p", 2, "min_p", "between 0 and 1, got 2"),
    ("repetition_penalty", 0, "repetition_penalty", "greater than 0 and at most 100, got 0"),
    ("repetition_penalty", 101, "repetition_penalty", "greater than 0 and at most 100, got 101"),
    ("presence_penalty", 2.1, "presence_penalty", "between -2 and 2, got 2.1"),
    ("frequency_penalty", -2.1, "frequency_penalty", "between -2 and 2, got -2.1"),
    ("logit_bias", {"5": 101}, "logit_bias", "between -100 and 100, got 101"),
    ("logit_bias", {"five": 1}, "logit_bias", "'five' is no token id"),
    ("logit_bias", {"05": 1}, "logit_bias", "'05' is no token id"),
    ("logit_bias", {"5" * 5000: 1}, "logit_bias", "is no token id"),
    ("logit_bias", {"100000": 1}, "logit_bias", "token id 100000 is outside the vocabulary, 0 to 98"),
    ("logit_bias", {"-1": 1}, "logit_bias", "'-1' is no token id"),
    ("logit_bias", [5], "logit_bias", "an object or null, got a list of 1 items"),
    ("min_tokens", -1, "min_tokens", "at least 0, got -1"),
    ("min_tokens", 5, "min_tokens", "between 0 and max_tokens, 4"),
    ("seed", -1, "seed", f"between 0 and {2**63 - 1} or null, got -1"),
    ("seed", 2**63, "seed", f"between 0 and {2**63 - 1} or null, got {2**63}"),
    ("stop", "", "stop", "a text of 1 to 4096 characters or a list of at most 16 items"),
    ("stop", ["a"] * 17, "stop", "at most 16 items or null, got a list of 17 items"),
    ("stop", ["a", 3], "stop[1]", "a text of 1 to 4096 characters, got 3"),
    ("include_stop_str_in_output", 1, "include_stop_str_in_output", "true or false, got 1"),
    ("stop_token_ids", [99], "stop_token_ids", "token id 99 is outside the vocabulary, 0 to 98"),
    ("stop_token_ids", [-1], "stop_token_ids", "token id -1 is outside the vocabulary, 0 to 98"),
    ("stop_token_ids", [HUGE], "stop_token_ids", "outside the vocabulary"),
    ("stop_token_ids", ["5"], "stop_token_ids[0]", 'an integer, got "5"'),
    ("stop_token_ids", list(range(50)), "stop_token_ids", "50 given"),
    ("ignore_eos", "yes", "ignore_eos", 'true or false, got "yes"'),
    ("skip_special_tokens", None, "skip_special_tokens", "true or false, got null"),
    ("return_token_ids", 1, "return_token_ids", "true or false, got 1"),
    ("stream", "yes", "stream", 'true or false, got "yes"'),
    ("stream_options", {"include_usage": True}, "stream_options", "stream true only"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage", "true or false, got 1"),
    ("stream_options", {"usage": True}, "stream_options.usage", "unknown field"),
    ("request_id", 5, "request_id", "a text or null, got 5"),
    ("user", {}, "user", "a text or null, got an object"),
    ("max_tokens", "many", "max_tokens", "an integer of at least 1 or null"),
    ("max_tokens", 0, "max_tokens", "an integer of at least 1 or null, got 0"),
    ("max_tokens", 1.5, "max_tokens", "an integer of at least 1 or null, got 1.5"),
    ("max_tokens", 127, "max_tokens", "limit of 128"),
    ("max_tokens", HUGE, "max_tokens", "limit of 128"),
    ("max_token", 2, "max_token", "did you mean max_tokens?"),
    ("response_format", {"type": "json_object"}, "response_format", "unknown field"),
]

#: Those of completions alone, beside a sound prompt or instead of it.
BAD_COMPLETION_FIELDS: list[tuple[str, Any, str, str]] = [
    ("best_of", 2, "best_of", "must be 1 or null, got 2"),
    ("echo", True, "echo", "must be false, got true"),
    ("logprobs", 21, "logprobs", "between 0 and 20 or null, got 21"),
    ("logprobs", True, "logprobs", "between 0 and 20 or null, got true"),
    ("prompt", [], "prompt", "empty"),
    ("prompt", "", "prompt", "empty"),
    ("prompt", [5, 99], "prompt", "token id 99 is outside the vocabulary, 0 to 98"),
    ("prompt", [5, -1], "prompt", "token id -1 is outside the vocabulary, 0 to 98"),
    ("prompt", [HUGE], "prompt", str(HUGE)),
    ("prompt", [5] * 200, "max_tokens", "200 tokens"),
    ("prompt", "1" * 200, "max_tokens", "200 tokens"),
    ("prompt", "1" * 3000, "max_tokens", "3000 tokens"),
    ("prompt", [[5], [6]], "prompt[0]", "an integer, got a list of 1 items"),
    ("prompt", ["a", "b"], "prompt[0]", 'an integer, got "a"'),
    ("prompt", [5, 1.5], "prompt[1]", "an integer, got 1.5"),
    ("prompt", None, "prompt", "a text or a list, got null"),
    ("messages", [], "messages", "unknown field"),
]

#: Those of chats alone; the demo's template writes nothing but contents.
BAD_CHAT_FIELDS: list[tuple[str, Any, str, str]] = [
    ("messages", [], "messages", "a list that is not empty, got a list of 0 items"),
    ("messages", ["hello"], "messages[0]", 'an object, got "hello"'),
    ("messages", "hello", "messages", 'a list that is not empty, got "hello"'),
    ("messages", [{"role": "user"}], "messages", "empty"),
    ("messages", [{"content": "1" * 200}], "max_tokens", "200 tokens"),
    ("tools", [3], "tools[0]", "an object, got 3"),
    ("chat_template_kwargs", [], "chat_template_kwargs", "an object or null, got a list"),
    ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs.tokenize", "no variable of the template"),
    ("add_generation_prompt", 1, "add_generation_prompt", "true or false, got 1"),
    ("continue_final_message", True, "continue_final_message", "add_generation_prompt false"),
    ("max_completion_tokens", 0, "max_completion_tokens", "at least 1 or null, got 0"),
    ("max_completion_tokens", 5, "max_completion_tokens", "contradicts max_tokens 4"),
    ("logprobs", 2, "logprobs", "true or false, got 2"),
    ("top_logprobs", 21, "top_logprobs", "between 0 and 20 or null, got 21"),
    ("top_logprobs", 2, "top_logprobs", "logprobs true only"),
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
    b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    b'{"messages": [{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]}",
    b"\x00" * 64,
]


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": [5, 6], "max_tokens": 4, **fields}).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "12"}], "max_tokens": 4, **fields}).encode()


async def _is_refused(client: Client, path: str, body: bytes, param: str, words: str) -> None:
    status, error = await client.refusal(body, path)
    assert (status, error.type, error.param) == (400, "invalid_request_error", param)
    assert param.partition("[")[0] in error.message
    assert words in error.message


@pytest.mark.parametrize(
    ("field", "value", "param", "words"), BAD_FIELDS + BAD_COMPLETION_FIELDS, ids=lambda value: str(value)[:30]
)
async def test_a_bad_field_of_a_completion_is_named(
    client: Client, field: str, value: Any, param: str, words: str
) -> None:
    await _is_refused(client, routes.COMPLETIONS, completion(**{field: value}), param, words)


@pytest.mark.parametrize(
    ("field", "value", "param", "words"), BAD_FIELDS + BAD_CHAT_FIELDS, ids=lambda value: str(value)[:30]
)
async def test_a_bad_field_of_a_chat_is_named(client: Client, field: str, value: Any, param: str, words: str) -> None:
    await _is_refused(client, routes.CHAT, chat(**{field: value}), param, words)


@pytest.mark.parametrize(
    ("kind", "table"), [(CompletionRequest, BAD_COMPLETION_FIELDS), (ChatRequest, BAD_CHAT_FIELDS)]
)
def test_the_tables_leave_no_field_out(
    kind: type[CompletionRequest | ChatRequest], table: list[tuple[Any, ...]]
) -> None:
    assert set(kind.__struct_fields__) <= {field for field, *_ in BAD_FIELDS + table}


@pytest.mark.parametrize(("path", "field"), [(routes.COMPLETIONS, "prompt"), (routes.CHAT, "messages")])
async def test_a_missing_field_is_named(client: Client, path: str, field: str) -> None:
    await _is_refused(client, path, b'{"max_tokens": 4}', field, "is missing")


async def test_a_prompt_that_fills_the_context_is_refused_without_a_limit_too(client: Client) -> None:
    await _is_refused(client, routes.COMPLETIONS, completion(prompt=[5] * 128, max_tokens=None), "prompt", "128")
    messages = [{"role": "user", "content": "1" * 128}]
    await _is_refused(client, routes.CHAT, chat(messages=messages, max_tokens=None), "messages", "128")


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT, routes.STAGE, routes.COMMIT])
@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:30]))
async def test_a_body_that_is_no_request(client: Client, path: str, body: bytes) -> None:
    status, error = await client.refusal(body, path)
    assert (status, error.type) == (400, "invalid_request_error")
    assert error.message


async def test_an_inflight_policy_that_does_not_exist(client: Client) -> None:
    body = b'{"run_id": "r", "version": 1, "inflight": "drop"}'
    await _is_refused(client, routes.COMMIT, body, "inflight", '"keep" or "recompute" or "wait", got "drop"')


async def test_bad_requests_disturb_nobody(client: Client) -> None:
    """A sound request gives the same while every bad one arrives, and the server goes on."""
    sound = {"prompt": [5, 6, 7], "max_tokens": 100, "temperature": 5.0, "n": 8, "seed": 1}
    alone = await client.choices(**sound)
    bad = [
        *(
            (routes.COMPLETIONS, completion(**{field: value}))
            for field, value, *_ in BAD_FIELDS + BAD_COMPLETION_FIELDS
        ),
        *((routes.CHAT, chat(**{field: value})) for field, value, *_ in BAD_FIELDS + BAD_CHAT_FIELDS),
        *((path, body) for path in (routes.COMPLETIONS, routes.CHAT) for body in BAD_BODIES),
    ]
    crowd, *refusals = await asyncio.gather(
        client.choices(**sound), *(client.refusal(body, path) for path, body in bad)
    )
    assert crowd == alone
    assert {status for status, _ in refusals} == {400}
    assert (await client.ask("GET", routes.HEALTH))[0] == 200


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT])
async def test_weights_of_another_run_are_not_sampled_from(client: Client, path: str) -> None:
    """A server that was restarted, or taken over, must not give a run tokens of weights that are not its own."""
    body = completion() if path == routes.COMPLETIONS else chat()
    status, error = await client.refusal(body, path, headers={routes.RUN_HEADER: "my-run"})
    assert (status, error.type) == (409, "conflict_error")
    assert "my-run" in error.message
    assert (await client.ask("POST", path, body, {routes.RUN_HEADER: ""}))[0] == 200


async def test_the_served_model_may_be_named(client: Client, server: Server) -> None:
    answer = await client.complete(prompt=[5], model=str(server.model))
    assert answer.model == str(server.model)
