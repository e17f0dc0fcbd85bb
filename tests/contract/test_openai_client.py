"""The unmodified OpenAI client gets completions, and errors of the classes it knows."""

from collections.abc import Iterator

import openai
import pytest

from tests.contract.servers import Server


@pytest.fixture
def official(server: Server, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
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


def test_a_bad_request(official: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(model=str(server.model), prompt=[5], max_tokens=10_000)
    assert caught.value.param == "max_tokens"
    assert caught.value.type == "invalid_request_error"
    assert "limit of 128" in caught.value.message
    with pytest.raises(openai.BadRequestError, match="best_of"):
        official.completions.create(model=str(server.model), prompt=[5], best_of=2)


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
