"""Conversations, rendered by the model's own template."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider.contract import routes
from outrider.contract.generation import version_spans_total
from tests.contract.client import Client
from tests.contract.conftest import KEY
from tests.contract.servers import STARTERS, Server

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello ☃"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
SEEDED: dict[str, Any] = {"messages": HELLO, "max_tokens": 40, "seed": 5, "ignore_eos": True}


async def test_a_conversation_goes_on(speaking_client: Client, speaking_server: Server) -> None:
    answer = await speaking_client.chat(**SEEDED, n=3, return_token_ids=True, request_id="mine")
    assert (answer.id, answer.object, answer.model) == ("mine", "chat.completion", str(speaking_server.model))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    tokenizer = AutoTokenizer.from_pretrained(speaking_server.model)
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == tokenizer.decode(choice.token_ids or [], skip_special_tokens=True)
        assert (len(choice.token_ids or []), choice.finish_reason) == (40, "length")
        assert version_spans_total(choice.weight_versions or []) == 40
        assert choice.logprobs is None
    assert answer.usage.completion_tokens == 120


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"chat_template_kwargs": {"mood": "calm"}}, {"mood": "calm"}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            {"add_generation_prompt": False, "continue_final_message": True},
        ),
    ],
)
async def test_the_template_renders_the_prompt(
    speaking_client: Client, speaking_server: Server, fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    """The same tokens come as for the rendered text as a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(speaking_server.model)
    text = tokenizer.apply_chat_template(HELLO, **{"add_generation_prompt": True, **variables}, tokenize=False)
    answer = await speaking_client.chat(messages=HELLO, max_tokens=12, temperature=0.0, return_token_ids=True, **fields)
    expected = await speaking_client.complete(prompt=text, max_tokens=12, temperature=0.0, return_token_ids=True)
    assert answer.usage == expected.usage
    assert answer.choices[0].token_ids == expected.choices[0].token_ids


async def test_a_long_conversation_is_rendered(speaking_client: Client, speaking_server: Server) -> None:
    """One that is longer than what is encoded on the event loop; the context is full of it."""
    tokenizer = AutoTokenizer.from_pretrained(speaking_server.model)
    messages = [{"role": "user", "content": "日本語のテキスト" * 260}]
    answer = await speaking_client.chat(messages=messages, max_tokens=3, ignore_eos=True)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert len(text) > 2000
    assert answer.usage.prompt_tokens == len(tokenizer.encode(text))


@pytest.mark.parametrize(
    "limit", [{"max_tokens": 9}, {"max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 9}]
)
async def test_the_limit_has_two_names(speaking_client: Client, limit: dict[str, int]) -> None:
    answer = await speaking_client.chat(messages=HELLO, ignore_eos=True, **limit)
    assert answer.usage.completion_tokens == 9


async def test_without_a_limit_it_is_what_the_context_holds(speaking_client: Client) -> None:
    answer = await speaking_client.chat(messages=HELLO, ignore_eos=True)
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


async def test_stop_texts_end_a_message(speaking_client: Client) -> None:
    [whole] = (await speaking_client.chat(**SEEDED, return_token_ids=True)).choices
    stop = whole.message.content[8:11]
    [ended] = (await speaking_client.chat(**SEEDED, stop=stop, return_token_ids=True)).choices
    assert ended.message.content == whole.message.content.partition(stop)[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == (whole.token_ids or [])[: len(ended.token_ids or [])]


async def test_log_probabilities_of_a_message(speaking_client: Client) -> None:
    """Each token with its text and its bytes: those of all tokens together are the message."""
    [choice] = (await speaking_client.chat(**SEEDED, logprobs=True, top_logprobs=5, skip_special_tokens=False)).choices
    content = choice.logprobs.content if choice.logprobs else []
    assert len(content) == 40
    said = bytes(byte for token in content for byte in token.bytes)
    assert said.decode(errors="replace") == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 5
        listed = [top.logprob for top in token.top_logprobs]
        assert listed == sorted(listed, reverse=True)
        assert token.logprob <= listed[0] + 1e-4 <= 1e-4


async def test_log_probabilities_without_alternatives(speaking_client: Client) -> None:
    [choice] = (await speaking_client.chat(**SEEDED, logprobs=True)).choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.content) == 40
    assert not any(token.top_logprobs for token in choice.logprobs.content)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "nobody", "content": ""}]}, "messages", "nobody has no say"),
        ({"messages": [{"role": "user", "content": "the cat" * 2000}]}, "messages", "512"),
        ({"messages": [{"role": "user", "content": "1" * 10**6}]}, "messages", "characters are more than"),
        ({"messages": [{"role": "user", "content": "1" * 500}], "max_tokens": 100}, "max_tokens", "limit of 512"),
        ({"tools": [{}]}, "messages", "chat template"),
        ({"tools": [3]}, "tools[0]", "must be an object"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"chat_template_kwargs": {"chat_template": "mine"}}, "chat_template_kwargs.chat_template", "no variable"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "contradicts max_tokens 3"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs true"),
        ({"prompt": "hello"}, "prompt", "unknown field"),
    ],
)
async def test_what_cannot_be_rendered_is_refused(
    speaking_client: Client, fields: dict[str, Any], param: str, words: str
) -> None:
    status, error = await speaking_client.refusal(json.dumps({"messages": HELLO, **fields}).encode(), routes.CHAT)
    assert (status, error.param, error.type) == (400, param, "invalid_request_error")
    assert words in error.message


async def test_the_demo_has_a_template(client: Client) -> None:
    """A bare one: what the user says is the prompt."""
    answer = await client.chat(messages=[{"role": "user", "content": "12+34="}], temperature=0.0)
    assert answer.choices[0].message.content == "46"


async def test_a_model_without_a_template_says_so(engine: str, demo_model: Path, tmp_path: Path) -> None:
    """And answers prompts all the same."""
    model = shutil.copytree(demo_model, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    server = STARTERS[engine](model, tmp_path, key=KEY)
    try:
        async with Client(server.url, KEY) as client:
            status, error = await client.refusal(json.dumps({"messages": HELLO}).encode(), routes.CHAT)
            assert (status, error.param) == (400, "messages")
            assert "no chat template; ask /v1/completions" in error.message
            assert (await client.complete(prompt="12+34=", temperature=0.0)).choices[0].text == "46"
    finally:
        server.kill()
