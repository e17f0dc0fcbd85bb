"""What a completion consists of."""

import asyncio
import math

import pytest

from outrider.contract import routes
from outrider.contract.chat import ChatRequest
from outrider.contract.generation import CompletionChoice, CompletionRequest, version_spans_total
from tests.contract.client import Client
from tests.contract.servers import Server

PROMPT = [5, 6, 7, 8]
#: Hot, so that the demo's model, which is sure of itself, does something different every time.
HOT = 5.0


def sampled(choices: list[CompletionChoice]) -> list[tuple[list[int] | None, list[float]]]:
    return [(choice.token_ids, choice.logprobs.token_logprobs if choice.logprobs else []) for choice in choices]


async def test_tokens_logprobs_versions_and_usage(client: Client, server: Server) -> None:
    answer = await client.complete(
        prompt=PROMPT, n=6, max_tokens=20, temperature=HOT, logprobs=0, return_token_ids=True, request_id="mine"
    )
    assert (answer.object, answer.model, answer.id) == ("text_completion", str(server.model), "mine")
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        assert choice.token_ids is not None
        assert choice.logprobs is not None
        assert choice.weight_versions is not None
        assert 1 <= len(choice.token_ids) <= 20
        assert all(0 <= token < 99 for token in choice.token_ids)
        assert len(choice.logprobs.token_logprobs) == len(choice.token_ids)
        assert all(logprob <= 0 and math.isfinite(logprob) for logprob in choice.logprobs.token_logprobs)
        assert version_spans_total(choice.weight_versions) == len(choice.token_ids)
        assert {version for version, _ in choice.weight_versions} == {0}
        assert choice.finish_reason == ("length" if len(choice.token_ids) == 20 else "stop")
    generated = sum(len(choice.token_ids or []) for choice in answer.choices)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == generated
    assert answer.usage.total_tokens == len(PROMPT) + generated


async def test_only_what_is_asked_for_is_sent(client: Client) -> None:
    [choice] = (await client.complete(prompt=PROMPT, max_tokens=3)).choices
    assert (choice.token_ids, choice.logprobs, choice.weight_versions) == (None, None, None)


async def test_text_in_text_out(client: Client) -> None:
    """The demo's model adds; the end-of-text token ends the answer and is not part of its text."""
    answer = await client.complete(prompt="1+1=", temperature=0.0, max_tokens=16, logprobs=0, return_token_ids=True)
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert (choice.token_ids or [])[-1] == 1
    assert choice.text
    assert "<" not in choice.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


async def test_greedy_is_the_same_every_time(client: Client) -> None:
    first, *rest = await asyncio.gather(
        *(client.choices(prompt=PROMPT, max_tokens=24, temperature=0.0, n=2) for _ in range(3))
    )
    assert sampled(first)[0] == sampled(first)[1]
    assert all(sampled(choices) == sampled(first) for choices in rest)


async def test_a_seed_decides_and_other_seeds_differ(client: Client) -> None:
    async def draw(seed: int) -> list[tuple[list[int] | None, list[float]]]:
        return sampled(await client.choices(prompt=PROMPT, max_tokens=24, temperature=HOT, seed=seed))

    alone = await draw(1)
    together = await asyncio.gather(*(draw(seed) for seed in (1, 2, 3, 1, 2**63 - 1)))
    assert together[0] == together[3] == alone
    assert len({str(tokens) for tokens in together}) == 4


async def test_a_choice_does_not_depend_on_how_many_are_asked_for(client: Client) -> None:
    one, three, eight = await asyncio.gather(
        *(client.choices(prompt=PROMPT, max_tokens=24, temperature=HOT, seed=9, n=n) for n in (1, 3, 8))
    )
    assert sampled(one) == sampled(eight)[:1]
    assert sampled(three) == sampled(eight)[:3]
    assert len({str(drawn) for drawn in sampled(eight)}) == 8


async def test_without_a_seed_requests_differ(client: Client) -> None:
    draws = await asyncio.gather(
        *(client.choices(prompt=PROMPT, max_tokens=24, temperature=HOT, n=2) for _ in range(3))
    )
    assert len({str(choice.token_ids) for choices in draws for choice in choices}) == 6


async def test_stop_token_ids_end_a_completion(client: Client) -> None:
    """The stop token is the last token of the completion, as the trainer needs it."""
    everything = list(range(40, 50))
    choices = await client.choices(
        prompt=PROMPT, max_tokens=100, temperature=100.0, n=16, seed=4, stop_token_ids=everything
    )
    ends = set()
    for choice in choices:
        assert choice.token_ids is not None
        *body, last = choice.token_ids
        assert not set(body) & {1, *everything}
        assert (choice.finish_reason == "stop") == (last in {1, *everything})
        ends.add(last)
    assert ends & set(everything)


async def test_length_ends_a_completion(client: Client) -> None:
    choices = await client.choices(prompt=PROMPT, max_tokens=1, temperature=HOT, top_k=50, n=4, seed=0)
    for choice in choices:
        assert len(choice.token_ids or []) == 1
        assert choice.finish_reason == ("stop" if choice.token_ids == [1] else "length")


async def test_prompt_and_completion_may_fill_the_limit(client: Client) -> None:
    [choice] = await client.choices(prompt=[5] * 100, max_tokens=28, temperature=HOT)
    assert len(choice.token_ids or []) <= 28


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-38},
        {"temperature": 5e-46},
        {"temperature": 100.0, "top_p": 1e-30},
        {"temperature": HOT, "top_k": 1},
        {"top_k": 2**31 - 1, "top_p": 1.0},
        {"top_k": 0},
    ],
)
async def test_extreme_sampling_is_served(client: Client, sampling: dict[str, float]) -> None:
    """Figures at the ends of their ranges neither overflow nor end the server."""
    choices = await client.choices(prompt=PROMPT, max_tokens=6, n=2, **sampling)
    for choice in choices:
        assert choice.logprobs is not None
        assert all(math.isfinite(logprob) for logprob in choice.logprobs.token_logprobs)
    assert (await client.ask("GET", routes.HEALTH))[0] == 200


async def test_cold_sampling_is_greedy(client: Client) -> None:
    greedy = await client.greedy(PROMPT)
    for sampling in ({"temperature": 1e-38}, {"top_k": 1}, {"top_p": 1e-30}):
        [choice] = await client.choices(prompt=PROMPT, max_tokens=8, **sampling)
        assert choice.token_ids == greedy


async def test_more_requests_than_slots_are_all_answered(client: Client) -> None:
    """32 sequences are decoded at once; the others wait for their turn."""
    answers = await asyncio.gather(
        *(client.choices(prompt=[5, 6 + i], max_tokens=8, temperature=HOT, n=4) for i in range(24))
    )
    assert all(len(choices) == 4 for choices in answers)
    await client.until_idle()


async def test_metrics_count(client: Client) -> None:
    before = [await client.metric(f"vllm:{name}_total") for name in ("prompt_tokens", "generation_tokens")]
    answer = await client.complete(prompt=PROMPT, max_tokens=9, temperature=HOT)
    after = [await client.metric(f"vllm:{name}_total") for name in ("prompt_tokens", "generation_tokens")]
    gained = [new - old for new, old in zip(after, before, strict=True)]
    assert answer.usage is not None
    assert gained == [len(PROMPT), answer.usage.completion_tokens]


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_every_field_of_the_contract_is_of_openai_or_vllm(kind: type[CompletionRequest | ChatRequest]) -> None:
    """A client's field is either served or refused: a new one here needs a test of what it does."""
    own = {
        CompletionRequest: {"prompt", "logprobs", "max_tokens", "echo", "best_of"},
        ChatRequest: {
            "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
            "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
        },
    }  # fmt: skip
    assert set(kind.__struct_fields__) == own[kind] | {
        "model", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "min_tokens", "seed", "stop", "include_stop_str_in_output", "stop_token_ids",
        "ignore_eos", "skip_special_tokens", "return_token_ids", "stream", "stream_options", "request_id", "user",
    }  # fmt: skip
