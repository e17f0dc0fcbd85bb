"""The engine's core against ``generate``, against itself under other company, and when memory runs out."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import MinPLogitsWarper

from outrider.server.torch_engine import kernels
from outrider.server.torch_engine.cache import BLOCK
from tests.server.cores import Bench, Choice, reference


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 99) for _ in range(source.randrange(1, longest))] for _ in range(count)]


def assert_greedy_as_generate(bench: Bench, path: Path) -> None:
    """Token for token."""
    batch, model = prompts(12), reference(path)
    numbers = [bench.ask(prompt, max_tokens=24, temperature=0.0) for prompt in batch]
    bench.steps()
    for prompt, number in zip(batch, numbers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert bench.choices[number][0].tokens == expected.tolist()


def plain_logits(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits at which each of ``tokens`` was drawn, by one plain forward pass; [tokens, vocabulary]."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()


def content(choices: list[Choice]) -> list[tuple[list[int], list[float]]]:
    return [(choice.tokens, choice.logprobs) for choice in choices]


def test_greedy_equals_generate(random_model: Path) -> None:
    assert_greedy_as_generate(Bench(random_model), random_model)


def test_logprobs_are_those_of_the_trainer(random_model: Path) -> None:
    bench, model = Bench(random_model), reference(random_model)
    batch = prompts(16, seed=1)
    numbers = [bench.ask(prompt, n=4, seed=i, max_tokens=40, temperature=0.7) for i, prompt in enumerate(batch)]
    bench.steps()
    gaps = []
    for prompt, number in zip(batch, numbers, strict=True):
        for choice in bench.choices[number]:
            logprobs = torch.log_softmax(plain_logits(model, prompt, choice.tokens) / 0.7, -1)
            expected = logprobs.gather(1, torch.tensor(choice.tokens)[:, None])[:, 0]
            gaps += (expected - torch.tensor(choice.logprobs)).abs().tolist()
    assert len(gaps) > 1000
    assert sum(gaps) / len(gaps) <= 1e-5


def test_company_does_not_change_a_sequence(random_model: Path) -> None:
    assert_company_changes_nothing(random_model, "float32")


@pytest.mark.parametrize("random_model", ["qwen3", "gemma2"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nor_does_it_without_kernels(random_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    assert_company_changes_nothing(random_model, dtype)


def assert_company_changes_nothing(random_model: Path, dtype: str) -> None:
    """Alone, in a crowd, as one of n, prefilled in chunks, from the prefix cache, or put back for lack of room: the
    same bits."""
    alone = Bench(random_model, dtype=dtype)
    batch = prompts(24, seed=2, longest=60)
    batch[5] = batch[4] + batch[5][:20]  # a shared prefix
    expected = [content(alone.complete(p, n=2, seed=i, max_tokens=30)) for i, p in enumerate(batch)]
    for settings in ({"prefix_blocks": 64}, {"cache_positions": 512, "prefix_blocks": 16}):
        crowd = Bench(random_model, dtype=dtype, **settings)
        for _ in range(2):
            order = list(range(len(batch)))
            random.Random(0).shuffle(order)
            numbers = {index: crowd.ask(batch[index], n=2, seed=index, max_tokens=30) for index in order}
            crowd.steps()
            for index, number in numbers.items():
                assert content(crowd.choices[number]) == expected[index]
        assert crowd.core.prefixes.hits > 0
        assert (crowd.core.scheduler.preemptions > 0) == ("cache_positions" in settings)


def test_nor_does_a_much_longer_neighbour(endless_model: Path) -> None:
    """Sums over many positions are split by matrix kernels in ways that depend on how many they are."""
    room = {"max_model_len": 1024, "max_num_seqs": 16, "cache_positions": 16 * 1024}
    batch = prompts(6, seed=3, longest=200)
    alone, crowd = Bench(endless_model, **room), Bench(endless_model, **room)
    expected = [content(alone.complete(p, n=2, seed=i, max_tokens=300)) for i, p in enumerate(batch)]
    crowd.ask([9] * 600, max_tokens=400)
    crowd.steps(20)
    numbers = [crowd.ask(p, n=2, seed=i, max_tokens=300) for i, p in enumerate(batch)]
    crowd.steps()
    assert [content(crowd.choices[number]) for number in numbers] == expected


def test_a_group_prefills_its_prompt_once(random_model: Path) -> None:
    bench = Bench(random_model)
    bench.ask([5] * 100, n=16, max_tokens=5, ignore_eos=True)
    bench.steps(1)
    assert bench.core.slots.used == 1
    bench.steps(1)  # each of the others computes one token of the prompt
    assert bench.core.slots.decoding == 16


def test_no_memory_is_left_over(random_model: Path) -> None:
    bench = Bench(random_model, cache_positions=256, prefix_blocks=8)
    for index, prompt in enumerate(prompts(40, seed=4, longest=45)):
        bench.ask(prompt, n=1 + index % 3, seed=index, max_tokens=60, min_tokens=30)
        bench.steps(1)
    bench.steps()
    core = bench.core
    assert core.scheduler.preemptions > 0
    assert (core.slots.used, core.slots.decoding, core.scheduler.waiting_count, core.requests) == (0, 0, 0, {})
    assert core.slots.occupants == []
    assert all(choice.reason in ("stop", "length") for choices in bench.choices.values() for choice in choices)
    assert len(core.prefixes._known) + len(core.prefixes._free) == 8


def test_prefixes_are_found_until_the_weights_change(random_model: Path, tmp_path: Path) -> None:
    bench = Bench(random_model, prefix_blocks=32)
    first = prompts(1, seed=5)[0][:5] + [9] * 60
    [answer] = bench.complete(first, max_tokens=20, temperature=0.0)
    turn = first + answer.tokens + [7, 8]
    queries, hits = bench.core.prefixes.queries, bench.core.prefixes.hits
    bench.complete(turn, max_tokens=4, temperature=0.0)
    # All whole blocks of the first turn, the answer included, but not its last token, which was never computed.
    assert bench.core.prefixes.hits - hits == (len(first + answer.tokens) - 1) // BLOCK * BLOCK
    assert bench.core.prefixes.queries - queries == len(turn)
    bench.stage(dict(reference(random_model, seed=1).named_parameters()), tmp_path)
    bench.core.commit(1, "keep")
    hits = bench.core.prefixes.hits
    bench.complete(turn, max_tokens=4, temperature=0.0)
    assert bench.core.prefixes.hits == hits


def test_stop_tokens_and_the_end_of_text(demo_model: Path) -> None:
    bench = Bench(demo_model)
    [whole] = bench.complete([5, 6, 7], max_tokens=40, seed=1)
    assert whole.reason == "stop"
    assert whole.tokens[-1] == 1
    [longer] = bench.complete([5, 6, 7], max_tokens=40, seed=1, ignore_eos=True)
    assert (longer.reason, len(longer.tokens)) == ("length", 40)
    assert longer.tokens[: len(whole.tokens)] == whole.tokens
    middle = longer.tokens[10]
    [stopped] = bench.complete([5, 6, 7], max_tokens=40, seed=1, ignore_eos=True, stop_token_ids=(middle,))
    assert stopped.tokens == longer.tokens[: longer.tokens.index(middle) + 1]
    [patient] = bench.complete([5, 6, 7], max_tokens=40, seed=1, min_tokens=30)
    assert len(patient.tokens) >= 30
    assert 1 not in patient.tokens[:30]


def test_abort_and_the_end_of_one_choice(demo_model: Path) -> None:
    from outrider.server.torch_engine.messages import Abort

    bench = Bench(demo_model, max_num_seqs=4)
    bench.ask([9], max_tokens=3)
    first = bench.ask([5, 6], n=3, max_tokens=50, ignore_eos=True)
    second = bench.ask([7, 8], n=3, max_tokens=50, ignore_eos=True)  # two of it wait
    bench.steps(5)
    bench.core.abort(Abort(request=first, index=1))  # another one moves into its slot
    bench.core.abort(Abort(request=second, silent=False))
    bench.steps()
    assert [choice.reason for choice in bench.choices[first]] == ["length", None, "length"]
    assert [choice.reason for choice in bench.choices[second]] == ["abort"] * 3
    assert [] in [choice.tokens for choice in bench.choices[second]]
    assert bench.core.requests == {}
    assert bench.core.slots.used == 0


def test_a_stream_is_the_same_completion(random_model: Path) -> None:
    bench = Bench(random_model, cache_positions=256)
    batch = prompts(6, seed=7)
    options = {"n": 2, "max_tokens": 60, "alternatives": 2, "min_tokens": 40}
    whole = [bench.ask(p, seed=i, **options) for i, p in enumerate(batch)]
    streamed = [bench.ask(p, seed=i, stream=True, **options) for i, p in enumerate(batch)]
    bench.steps()
    assert bench.core.scheduler.preemptions > 0
    for a, b in zip(whole, streamed, strict=True):
        for one, parts in zip(bench.choices[a], bench.choices[b], strict=True):
            assert one.deltas == 1
            assert parts.deltas >= len(parts.tokens) - 1
            assert len(one.top_ids) == len(one.top_logprobs) == 2 * len(one.tokens)
            one.deltas = parts.deltas
            assert one == parts


def test_truncated_sampling_reports_the_truncated_distribution(demo_model: Path) -> None:
    bench, model = Bench(demo_model), reference(demo_model)
    prompt = [5, 6, 7, 8]
    choices = bench.complete(prompt, n=200, max_tokens=1, temperature=1.3, top_k=3, top_p=0.9, seed=5)
    probabilities = torch.softmax(plain_logits(model, prompt, [3])[0] / 1.3, -1)
    top, ids = probabilities.topk(3)
    top = top / top.sum()
    kept = 1 + int((top.cumsum(0) < 0.9).sum())
    expected = dict(zip(ids[:kept].tolist(), (top[:kept] / top[:kept].sum()).log().tolist(), strict=True))
    seen = {choice.tokens[0]: choice.logprobs[0] for choice in choices}
    assert seen.keys() <= expected.keys()
    for token, logprob in seen.items():
        assert logprob == pytest.approx(expected[token], abs=1e-4)


def test_sampling_follows_the_distribution(demo_model: Path) -> None:
    choices = Bench(demo_model).complete([5, 6, 7, 8], n=1000, max_tokens=1, seed=3)
    frequency: dict[int, float] = {}
    probability: dict[int, float] = {}
    for choice in choices:
        token = choice.tokens[0]
        frequency[token] = frequency.get(token, 0) + 1 / 1000
        probability[token] = float(torch.tensor(choice.logprobs[0]).exp())
    for token, share in frequency.items():
        assert abs(share - probability[token]) < 5 * (probability[token] / 1000) ** 0.5 + 0.005


def test_min_p_and_repetition_penalty_are_those_of_transformers(random_model: Path) -> None:
    bench, model = Bench(random_model), reference(random_model)
    prompt = prompts(1, seed=9)[0]
    [choice] = bench.complete(prompt, max_tokens=30, temperature=0.8, min_p=0.05, repetition_penalty=1.3, seed=2,
                              ignore_eos=True)  # fmt: skip
    logits = plain_logits(model, prompt, choice.tokens)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    for place, (token, logprob) in enumerate(zip(choice.tokens, choice.logprobs, strict=True)):
        seen = torch.tensor([prompt + choice.tokens[:place]])
        scores = MinPLogitsWarper(0.05)(seen, processors(seen, logits[place][None].clone()) / 0.8)
        assert logprob == pytest.approx(float(torch.log_softmax(scores, -1)[0, token]), abs=2e-5)


def test_presence_and_frequency_penalties_and_biases(random_model: Path) -> None:
    bench, model = Bench(random_model), reference(random_model)
    prompt = prompts(1, seed=11)[0]
    [choice] = bench.complete(prompt, max_tokens=30, presence_penalty=0.7, frequency_penalty=-0.4, seed=4,
                              logit_bias=((20, 3.0), (21, -100.0)), ignore_eos=True)  # fmt: skip
    logits = plain_logits(model, prompt, choice.tokens)
    for place, (token, logprob) in enumerate(zip(choice.tokens, choice.logprobs, strict=True)):
        scores = logits[place].clone()
        scores[20] += 3.0
        scores[21] -= 100.0
        for each in set(choice.tokens[:place]):
            scores[each] -= 0.7 - 0.4 * choice.tokens[:place].count(each)
        assert logprob == pytest.approx(float(torch.log_softmax(scores, -1)[token]), abs=2e-5)
    assert 21 not in choice.tokens


def test_what_is_not_finite_fails_its_requests_and_nobody_later(random_model: Path, tmp_path: Path) -> None:
    bench = Bench(random_model)
    sound = dict(reference(random_model).named_parameters())
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in sound.items()}
    expected = content(bench.complete([5, 6, 7], max_tokens=10, seed=1))
    running = bench.ask([5, 6], n=2, max_tokens=50, ignore_eos=True)
    bench.steps(3)
    bench.stage(broken, tmp_path)
    bench.core.commit(1, "keep")
    bench.steps()
    assert "version 1 give probabilities that are not finite" in bench.failures[running]
    bench.stage(sound, tmp_path)
    bench.core.commit(2, "keep")
    assert content(bench.complete([5, 6, 7], max_tokens=10, seed=1)) == expected
