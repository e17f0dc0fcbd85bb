"""How tokens are chosen: every field of the sampling surface does what it says."""

from typing import Any

import pytest

from tests.contract.client import Client

PROMPT = [5, 6, 7, 8]
EOS = 1
HOT: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "temperature": 5.0, "seed": 1, "n": 4}


async def tokens(client: Client, **fields: Any) -> list[list[int]]:
    return [choice.token_ids or [] for choice in await client.choices(**fields)]


async def test_end_of_text_may_be_ignored(client: Client) -> None:
    """Then it is a token like any other; a stop token still ends the completion."""
    plain = await tokens(client, **HOT, logit_bias={"1": 100})
    assert all(ids == [EOS] for ids in plain)
    ignored = await client.choices(**HOT, logit_bias={"1": 100}, ignore_eos=True)
    assert [(choice.token_ids, choice.finish_reason) for choice in ignored] == [([EOS] * 40, "length")] * 4
    stopped = await client.choices(**HOT, logit_bias={"1": 100}, ignore_eos=True, stop_token_ids=[EOS])
    assert [(choice.token_ids, choice.finish_reason) for choice in stopped] == [([EOS], "stop")] * 4


async def test_nothing_ends_before_min_tokens(client: Client) -> None:
    for ids in await tokens(client, **HOT, min_tokens=20, logit_bias={"1": 100}):
        assert len(ids) == 21
        assert EOS not in ids[:20]
    stops = list(range(20, 30))
    for ids in await tokens(client, **HOT, min_tokens=20, stop_token_ids=stops):
        assert len(ids) >= 20
        assert not set(ids[:20]) & {EOS, *stops}
    assert {len(ids) for ids in await tokens(client, **HOT, min_tokens=40)} == {40}


async def test_a_bias_forces_and_forbids(client: Client) -> None:
    assert all(set(ids) == {9} for ids in await tokens(client, **HOT, logit_bias={"9": 100}))
    forbidden = {str(id): -100 for id in range(50)}
    for ids in await tokens(client, **{**HOT, "temperature": 1.0}, logit_bias=forbidden):
        assert all(id >= 50 for id in ids)


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 100.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
async def test_penalties_make_for_variety(weights_client: Client, penalty: dict[str, float]) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 90, "temperature": 0.0}
    [plain] = await tokens(weights_client, **fields)
    [varied] = await tokens(weights_client, **fields, **penalty)
    assert len(set(varied)) > len(set(plain))


async def test_rewards_for_repetition_do_the_contrary(weights_client: Client) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 90, "temperature": 2.0, "seed": 4}
    [plain] = await tokens(weights_client, **fields)
    [same] = await tokens(weights_client, **fields, frequency_penalty=-2.0)
    assert len(set(same)) < len(set(plain))


async def test_a_repetition_penalty_counts_the_prompt(weights_client: Client) -> None:
    """Whose tokens are drawn no more if all of them are penalized without mercy."""
    prompt = list(range(3, 93))
    [ids] = await tokens(
        weights_client, prompt=prompt, max_tokens=4, temperature=0.0, repetition_penalty=100.0, logit_bias={"95": 3}
    )
    assert not set(ids) & set(prompt)


async def test_min_p_and_top_p_leave_out_the_unlikely(client: Client) -> None:
    greedy = await client.greedy(PROMPT, 16)
    for sampling in ({"min_p": 1.0}, {"top_p": 1e-6}, {"top_k": 1}):
        assert await tokens(client, prompt=PROMPT, max_tokens=16, **sampling) == [greedy]
    some = await tokens(client, **HOT, min_p=0.2)
    assert some != await tokens(client, **HOT)


async def test_no_max_tokens_is_what_the_context_holds(client: Client) -> None:
    [choice] = await client.choices(prompt=[5] * 100, max_tokens=None, ignore_eos=True, temperature=5.0)
    assert len(choice.token_ids or []) == 28
    assert choice.finish_reason == "length"
