"""Streams of server-sent events: the same completions, as they come, and what happens when something breaks."""

import asyncio
import json
import math
import uuid
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.errors import ErrorBody
from outrider.contract.generation import CompletionResponse, VersionSpan, append_version
from tests.contract.client import Client
from tests.contract.conftest import EndlessModel
from tests.contract.publishing import publishing

PROMPT = [5, 6, 7]
BABBLE: dict[str, Any] = {
    "prompt": "the cat", "max_tokens": 60, "temperature": 1.0, "n": 4, "seed": 7, "return_token_ids": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 0},
        {"logprobs": 3},
        {"skip_special_tokens": False},
        {"ignore_eos": True, "stop": ["a", "本"]},
        {"ignore_eos": True, "stop": "e", "include_stop_str_in_output": True, "min_tokens": 20},
        {"stop": "no such text"},
    ],
)
async def test_a_stream_adds_up_to_the_completion(speaking_client: Client, fields: dict[str, Any]) -> None:
    """Texts, tokens, log-probabilities, versions and endings; characters are never torn apart."""
    whole = await speaking_client.complete(**BABBLE, **fields)
    chunks = await speaking_client.chunks(**BABBLE, **fields)
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    parts: dict[int, list[Any]] = defaultdict(list)
    for chunk in chunks:
        assert chunk.usage is None
        [choice] = chunk.choices
        assert not parts[choice.index] or parts[choice.index][-1].finish_reason is None
        parts[choice.index].append(choice)
    assert len(parts) == 4
    for choice in whole.choices:
        deltas = parts[choice.index]
        assert "".join(delta.text for delta in deltas) == choice.text
        assert [token for delta in deltas for token in delta.token_ids] == choice.token_ids
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (choice.finish_reason, choice.stop_reason)
        versions: list[VersionSpan] = []
        for version, count in (span for delta in deltas for span in delta.weight_versions):
            append_version(versions, version, count)
        assert versions == choice.weight_versions
        if choice.logprobs is not None:
            for name in ("token_logprobs", "tokens", "top_logprobs", "text_offset"):
                expected = getattr(choice.logprobs, name)
                added = [getattr(delta.logprobs, name) for delta in deltas]
                assert (expected is None) == all(each is None for each in added)
                assert [value for each in added for value in each or []] == (expected or [])


async def test_a_chat_stream_adds_up_to_the_message(speaking_client: Client) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "seed": 3, "n": 3, "logprobs": True,
        "top_logprobs": 2, "return_token_ids": True,
    }  # fmt: skip
    whole = await speaking_client.chat(**fields)
    chunks = await speaking_client.chat_chunks(**fields)
    for choice in whole.choices:
        deltas = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert [delta.delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
        assert [token for delta in deltas for token in delta.token_ids or []] == choice.token_ids
        assert deltas[-1].finish_reason == choice.finish_reason
        content = [token for delta in deltas if delta.logprobs for token in delta.logprobs.content]
        assert choice.logprobs is not None
        assert content == choice.logprobs.content


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT])
async def test_usage_comes_last_if_it_is_asked_for(speaking_client: Client, path: str) -> None:
    prompt = {"prompt": "hello"} if path == routes.COMPLETIONS else {"messages": [{"role": "user", "content": "hello"}]}
    fields: dict[str, Any] = {**prompt, "max_tokens": 10, "n": 2, "ignore_eos": True}
    events = [event async for event in speaking_client.events(path, **fields, stream_options={"include_usage": True})]
    *chunks, last = [json.loads(event) for event in events[:-1]]
    assert events[-1] == b"[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 20
    assert last["usage"]["total_tokens"] == 20 + last["usage"]["prompt_tokens"]
    plain = [event async for event in speaking_client.events(path, **fields, stream_options={"include_usage": False})]
    assert all(json.loads(event)["choices"] for event in plain[:-1])


async def test_chunks_without_text_are_sent_to_those_who_count_tokens_only(speaking_client: Client) -> None:
    plain = await speaking_client.chunks(**{**BABBLE, "return_token_ids": False})
    assert all(choice.text or choice.finish_reason for chunk in plain for choice in chunk.choices)
    assert all(choice.token_ids is None for chunk in plain for choice in chunk.choices)
    counted = await speaking_client.chunks(**BABBLE)
    assert len(counted) > len(plain)


async def test_tokens_come_as_they_are_sampled(weights_client: Client) -> None:
    """The first of them long before the last one."""
    stream = weights_client.events(routes.COMPLETIONS, prompt=PROMPT, max_tokens=1000)
    first = msgspec.json.decode(await anext(stream), type=CompletionResponse)
    assert first.choices[0].finish_reason is None
    assert await weights_client.metric("vllm:num_requests_running") == 1
    await stream.aclose()
    await weights_client.until_idle()


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_its_request(weights_client: Client, path: str, stream: bool) -> None:
    """At once, with all its choices; those of others go on."""
    prompt = {"prompt": PROMPT} if path == routes.COMPLETIONS else {"messages": [{"role": "user", "content": "567"}]}
    body = json.dumps({**prompt, "max_tokens": 1000, "n": 8, "stream": stream}).encode()
    stays = asyncio.create_task(weights_client.choices(prompt=[9, 9], max_tokens=900, n=2))

    async def leave() -> None:
        async with weights_client.session.post(path, data=body) as answer:
            await answer.read()

    leaves = asyncio.create_task(leave())
    await weights_client.until_running(10)
    before = await weights_client.metric("vllm:generation_tokens_total")
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    assert [len(choice.token_ids or []) for choice in await stays] == [900, 900]
    await weights_client.until_idle()
    generated = await weights_client.metric("vllm:generation_tokens_total") - before
    assert generated < 2 * 900 + 8 * 900


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT])
async def test_an_error_in_the_middle_is_the_last_event(
    weights_client: Client, endless_model: EndlessModel, path: str
) -> None:
    """Weights that give no probabilities come into use while the stream runs."""
    prompt = {"prompt": PROMPT} if path == routes.COMPLETIONS else {"messages": [{"role": "user", "content": "567"}]}
    info = await weights_client.get(routes.INFO, ServerInfo)
    with publishing(endless_model(1), info, uuid.uuid4().hex[:12]) as publisher:
        originals = {name: tensor.clone() for name, tensor in publisher.tensors.items()}
        for tensor in publisher.tensors.values():
            tensor.fill_(math.nan)
        diverged = await asyncio.wrap_future(publisher.publish(3))
        await weights_client.stage(diverged)
        stream = weights_client.events(path, **prompt, max_tokens=1000, n=4)
        events = [await anext(stream)]
        await weights_client.commit(diverged)
        events += [event async for event in stream]
        for name, tensor in publisher.tensors.items():
            tensor.copy_(originals[name])
        mended = await asyncio.wrap_future(publisher.publish(4))
        await weights_client.stage(mended)
        await weights_client.commit(mended)
    error = msgspec.json.decode(events[-1], type=ErrorBody).error
    assert error.type == "server_error"
    assert "version 3" in error.message
    assert all(b'"choices"' in event for event in events[:-1])
    assert len(await weights_client.greedy(PROMPT)) == 8


@pytest.mark.parametrize(
    ("fields", "param"), [({"max_tokens": 4000}, "max_tokens"), ({"prompt": [10**6]}, "prompt"), ({"n": 0}, "n")]
)
async def test_an_error_before_the_first_event_is_an_ordinary_answer(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"prompt": [5], "stream": True, **fields}).encode()
    status, error = await client.refusal(body)
    assert (status, error.param) == (400, param)
