"""The unmodified OpenAI client completes, chats and streams, and gets errors of the classes it knows."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.contract.client import Client
from tests.contract.conftest import KEY
from tests.contract.servers import Server

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture
def official(server: Server, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
def speaking(speaking_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{speaking_server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(official: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in official.models.list()] == [str(server.model)]


def test_text(official: openai.OpenAI, server: Server) -> None:
    answer = official.completions.create(model=str(server.model), prompt="1+1=", max_tokens=8, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_token_ids_and_logprobs(official: openai.OpenAI, server: Server) -> None:
    answer = official.completions.create(
        model=str(server.model), prompt=[5, 6, 7], n=2, max_tokens=4, seed=1, logprobs=0,
        extra_body={"return_token_ids": True, "top_k": 20},
    )  # fmt: skip
    for choice in answer.choices:
        tokens = (choice.model_extra or {})["token_ids"]
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == len(tokens)


def test_everything_that_a_completion_may_be_asked_for(official: openai.OpenAI, server: Server) -> None:
    answer = official.completions.create(
        model=str(server.model), prompt="12+34=", best_of=1, echo=False, frequency_penalty=0.1, logit_bias={"9": -1},
        logprobs=2, max_tokens=8, n=1, presence_penalty=0.1, seed=1, stop=["6", "no"], temperature=0, top_p=0.9,
        user="me",
        extra_body={
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.01, "min_tokens": 1, "ignore_eos": False,
            "include_stop_str_in_output": True, "skip_special_tokens": True, "stop_token_ids": [30],
            "request_id": "mine",
        },
    )  # fmt: skip
    [choice] = answer.choices
    assert (answer.id, choice.text, choice.finish_reason) == ("mine", "46", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["4", "6"]
    assert choice.logprobs.text_offset == [0, 1]


def test_a_streamed_text(official: openai.OpenAI, server: Server) -> None:
    stream = official.completions.create(
        model=str(server.model), prompt="12+34=", temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "46"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_a_conversation(speaking: openai.OpenAI, speaking_server: Server) -> None:
    answer = speaking.chat.completions.create(
        model=str(speaking_server.model), messages=HELLO, tools=TOOLS, max_completion_tokens=20, n=2, seed=1,
        logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True, "chat_template_kwargs": {"mood": "calm"}},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert [len(token.top_logprobs) for token in content] == [3] * 20
        assert all(bytes(token.bytes or []).decode(errors="replace") == token.token for token in content)
    plain = speaking.chat.completions.create(model=str(speaking_server.model), messages=HELLO, max_completion_tokens=1)
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens, "the template has room for tools"


def test_a_streamed_conversation(speaking: openai.OpenAI, speaking_server: Server) -> None:
    fields: dict[str, Any] = {
        "model": str(speaking_server.model), "messages": HELLO, "max_tokens": 40, "seed": 1, "stop": "e",
    }  # fmt: skip
    whole = speaking.chat.completions.create(**fields).choices[0]
    *chunks, last = list(
        speaking.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert last.usage is not None
    assert last.usage.prompt_tokens > 0


@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_that_is_closed_frees_its_slots(
    weights_server: Server, weights_client: Client, chat: bool
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{weights_server.url}/v1", api_key=KEY, max_retries=0) as client:
        model = str(weights_server.model)
        stream: openai.AsyncStream[Any]
        if chat:
            stream = await client.chat.completions.create(model=model, messages=HELLO, n=4, stream=True)
        else:
            stream = await client.completions.create(model=model, prompt=[5], max_tokens=1000, n=4, stream=True)
        await anext(aiter(stream))
        await weights_client.until_running(4)
        await stream.close()
        await weights_client.until_idle()


def test_a_bad_request(official: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(model=str(server.model), prompt=[5], max_tokens=10_000)
    assert caught.value.param == "max_tokens"
    assert caught.value.type == "invalid_request_error"
    assert "limit of 128" in caught.value.message
    with pytest.raises(openai.BadRequestError, match="best_of"):
        official.completions.create(model=str(server.model), prompt=[5], best_of=2)
    with pytest.raises(openai.BadRequestError, match="between 0 and 100, got 200"):
        official.chat.completions.create(model=str(server.model), messages=HELLO, temperature=200)
    with pytest.raises(openai.BadRequestError, match="between 0 and 100, got 200"):
        official.chat.completions.create(model=str(server.model), messages=HELLO, temperature=200, stream=True)


def test_a_wrong_key(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        client.models.list()


def test_an_unknown_route(official: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        official.embeddings.create(model=str(server.model), input="text")


def test_a_conflict(official: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.ConflictError, match="another-run"):
        official.completions.create(
            model=str(server.model), prompt=[5], extra_headers={"X-Outrider-Run": "another-run"}
        )
