"""Texts of completions: stop texts, special tokens, and the texts of single tokens."""

import itertools
import math
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider.contract.generation import CompletionChoice
from tests.contract.client import Client, figures
from tests.contract.servers import Server
from tests.server.vocabularies import codec

#: Sampled hot and seeded: many texts, the same ones every time.
SEEDED: dict[str, Any] = {"prompt": "12+34=", "max_tokens": 60, "temperature": 5.0, "seed": 7, "ignore_eos": True}
BABBLE: dict[str, Any] = {"prompt": "the cat", "max_tokens": 60, "temperature": 1.0, "seed": 7, "ignore_eos": True}


def begins(whole: CompletionChoice, kept: list[int]) -> bool:
    """Whether ``kept`` are the first tokens of the choice."""
    return (whole.token_ids or [])[: len(kept)] == kept


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_text_ends_a_completion(client: Client, include: bool) -> None:
    """It is cut off from the text, unless it is to stay; the tokens that make it up are part of the completion."""
    wholes = await client.choices(**SEEDED, n=4)
    stop = wholes[0].text[20:22]
    ended = await client.choices(**SEEDED, n=4, stop=stop, include_stop_str_in_output=include)
    assert stop in wholes[0].text
    for whole, choice in zip(wholes, ended, strict=True):
        text, found, _ = whole.text.partition(stop)
        assert choice.text == (text + found if include else text)
        assert choice.token_ids is not None
        assert begins(whole, choice.token_ids)
        assert len(figures(choice).token_logprobs) == len(choice.token_ids)
        assert sum(count for _, count in choice.weight_versions or []) == len(choice.token_ids)
        if found:
            assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
            # The demo's tokens are characters: special ones apart, the last token is the last of the stop text.
            [shortest] = [size for size in range(61) if _shown(whole, size) == text + found][:1]
            assert len(choice.token_ids) == shortest
        else:
            assert (choice.finish_reason, choice.stop_reason) == ("length", None)
            assert len(choice.token_ids) == 60


def _shown(choice: CompletionChoice, size: int) -> str:
    return codec("demo").decode((choice.token_ids or [])[:size], True)


async def test_of_several_stop_texts_the_first_counts(client: Client) -> None:
    [whole] = await client.choices(**SEEDED)
    late, early = whole.text[30:32], whole.text[10:12]
    [choice] = await client.choices(**SEEDED, stop=[late, early, "no such text"])
    first = min((late, early), key=lambda stop: whole.text.index(stop) + len(stop))
    assert choice.stop_reason == first
    assert choice.text == whole.text.partition(first)[0]


async def test_a_stop_text_among_the_first_tokens_is_passed_over(client: Client) -> None:
    [whole] = await client.choices(**SEEDED)
    stop = whole.text[3]
    [choice] = await client.choices(**SEEDED, stop=stop, min_tokens=30)
    assert len(choice.token_ids or []) >= 30
    assert stop in choice.text
    assert begins(whole, choice.token_ids or [])


async def test_a_choice_that_is_stopped_frees_its_place(weights_client: Client) -> None:
    """The others go on, and the answer does not wait for tokens that nobody wants."""
    fields: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 900, "temperature": 1.0, "seed": 3}
    [whole] = await weights_client.choices(**fields)
    answer = await weights_client.complete(**fields, stop=whole.text[5:9], return_token_ids=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 200
    assert len(answer.choices[0].token_ids or []) == answer.usage.completion_tokens
    await weights_client.until_idle()


async def test_special_tokens_are_left_out_unless_they_are_wanted(client: Client) -> None:
    fields = {"prompt": "1+1=", "temperature": 0.0}
    [without] = (await client.complete(**fields)).choices
    [with_them] = (await client.complete(**fields, skip_special_tokens=False)).choices
    assert with_them.text == without.text + "<eos>"
    [stopped] = (await client.complete(**fields, skip_special_tokens=False, stop="<e")).choices
    assert (stopped.text, stopped.stop_reason) == (without.text, "<e")


async def test_the_most_likely_tokens_are_listed(client: Client) -> None:
    [choice] = await client_choices(client, prompt="12+34=", max_tokens=3, temperature=0.0, logprobs=4)
    logprobs = figures(choice)
    assert logprobs.tokens == ["4", "6", "<eos>"]
    assert logprobs.text_offset == [0, 1, 2]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs or [], strict=True):
        assert len(top) == 4
        assert top[token] == pytest.approx(logprob, abs=1e-4)
        assert max(top.values()) == top[token]
        assert all(value <= 0 for value in top.values())


async def client_choices(client: Client, **fields: Any) -> list[CompletionChoice]:
    return (await client.complete(return_token_ids=True, **fields)).choices


async def test_a_sampled_token_is_listed_even_if_it_is_unlikely(client: Client) -> None:
    choices = await client_choices(client, **SEEDED, logprobs=1, n=2)
    sizes = set()
    for choice in choices:
        logprobs = figures(choice)
        for token, top in zip(logprobs.tokens or [], logprobs.top_logprobs or [], strict=True):
            assert token in top
            sizes.add(len(top))
    assert sizes == {1, 2}


async def test_tokens_that_cannot_be_drawn_have_a_number_all_the_same(client: Client) -> None:
    """JSON knows no infinity."""
    [choice] = await client_choices(client, prompt="1", max_tokens=2, top_k=1, logprobs=3, ignore_eos=True)
    tops = figures(choice).top_logprobs or []
    assert [sorted(top.values()) for top in tops] == [[-9999.0, -9999.0, 0.0]] * 2


async def test_log_probabilities_of_one_token_agree(client: Client) -> None:
    """Whether alternatives are listed or not, and whether the tokens come one by one or together."""
    plain = await client.choices(**SEEDED, n=2)
    listed = await client_choices(client, **SEEDED, n=2, logprobs=20)
    for one, other in zip(plain, listed, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        ours, theirs = figures(one), figures(other)
        assert ours.token_logprobs == theirs.token_logprobs
        assert all(math.isfinite(value) for top in theirs.top_logprobs or [] for value in top.values())


async def test_offsets_of_tokens_that_are_parts_of_characters(speaking_client: Client, speaking_server: Server) -> None:
    """A token's text begins where the text of the tokens before it ends; a part of a character, where that begins."""
    tokenizer = AutoTokenizer.from_pretrained(speaking_server.model)
    [choice] = await client_choices(speaking_client, **BABBLE, logprobs=1)
    ids, logprobs = choice.token_ids or [], figures(choice)
    assert choice.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(logprobs.tokens or []) == len(logprobs.text_offset or []) == len(ids)
    offsets = logprobs.text_offset or []
    assert offsets == sorted(offsets)
    said = [
        (token, offset)
        for id, token, offset in zip(ids, logprobs.tokens or [], offsets, strict=True)
        if token and id not in tokenizer.all_special_ids
    ]
    after_whole = [
        here for (before, _), here in itertools.pairwise(said) if "\ufffd" not in before and "\ufffd" not in here[0]
    ]
    assert len(after_whole) > 5
    assert all(choice.text[offset:].startswith(token) for token, offset in after_whole)
