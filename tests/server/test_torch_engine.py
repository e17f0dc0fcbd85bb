"""The embedded engine against ``generate``, against itself under other company, and through weight updates."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.contract.generation import CompletionChoice, SamplingParams, version_spans_total
from outrider.server.config import RolloutConfig
from outrider.server.engine import Conflict, InvalidRequest
from outrider.server.torch_engine.engine import TorchEngine
from outrider.server.torch_engine.loading import load_engine
from outrider.weights.publish import Publisher


def start(model: Path, **options: object) -> TorchEngine:
    settings = {"max_num_seqs": 64, "max_model_len": 128, "max_num_batched_tokens": 256, **options}
    return load_engine(RolloutConfig(model=str(model), threads=1, **settings), "key")  # type: ignore[arg-type]


@pytest.fixture
def engine(random_model: Path) -> Iterator[TorchEngine]:
    engine = start(random_model)
    yield engine
    engine.close()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 99) for _ in range(source.randrange(1, longest))] for _ in range(count)]


async def complete(engine: TorchEngine, prompt: list[int], n: int = 1, **sampling: object) -> list[CompletionChoice]:
    return await engine.generate(prompt, SamplingParams(**sampling), n, "test")  # type: ignore[arg-type]


def reference_logprobs(
    model: torch.nn.Module, prompt: list[int], tokens: list[int], temperature: float
) -> torch.Tensor:
    """Log-probabilities of ``tokens`` by one plain forward pass over the whole sequence."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


async def test_greedy_equals_generate(engine: TorchEngine, random_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()
    batch = prompts(12)
    answers = await asyncio.gather(*(complete(engine, p, max_tokens=24, temperature=0.0) for p in batch))
    for prompt, [choice] in zip(batch, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert choice.token_ids == expected.tolist()


async def test_logprobs_are_those_of_the_trainer(engine: TorchEngine, random_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()
    batch = prompts(16, seed=1)
    answers = await asyncio.gather(
        *(complete(engine, p, n=4, max_tokens=40, temperature=0.7, seed=i) for i, p in enumerate(batch))
    )
    gaps = []
    for prompt, choices in zip(batch, answers, strict=True):
        for choice in choices:
            assert choice.token_ids is not None
            assert choice.logprobs is not None
            expected = reference_logprobs(model, prompt, choice.token_ids, 0.7)
            gaps += (expected - torch.tensor(choice.logprobs.token_logprobs)).abs().tolist()
    assert len(gaps) > 1000
    assert sum(gaps) / len(gaps) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_company_does_not_change_a_sequence(random_model: Path, dtype: str) -> None:
    """Alone, in a crowd, as one of n or with the prompt prefilled in chunks: the same bits."""
    engine = start(random_model, torch_dtype=dtype)
    batch = prompts(24, seed=2, longest=60)

    async def one(index: int) -> list[CompletionChoice]:
        return await complete(engine, batch[index], n=2, max_tokens=30, temperature=1.0, seed=index)

    alone = [await one(index) for index in range(len(batch))]
    order = list(range(len(batch)))
    random.Random(0).shuffle(order)
    crowd = dict(zip(order, await asyncio.gather(*(one(index) for index in order)), strict=True))
    for index in range(len(batch)):
        assert [c.token_ids for c in crowd[index]] == [c.token_ids for c in alone[index]]
        assert [c.logprobs for c in crowd[index]] == [c.logprobs for c in alone[index]]
    engine.close()


async def test_truncated_sampling_reports_the_truncated_distribution(demo_model: Path) -> None:
    engine = start(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompt = engine.encode("12+34=")
    choices = await complete(engine, prompt, n=200, max_tokens=1, temperature=1.3, top_k=3, top_p=0.9, seed=5)
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 1.3, -1)
    top, ids = probabilities.topk(3)
    top = top / top.sum()
    kept = 1 + int((top.cumsum(0) < 0.9).sum())
    expected = dict(zip(ids[:kept].tolist(), (top[:kept] / top[:kept].sum()).log().tolist(), strict=True))
    seen: dict[int, float] = {}
    for choice in choices:
        assert choice.token_ids is not None
        assert choice.logprobs is not None
        seen[choice.token_ids[0]] = choice.logprobs.token_logprobs[0]
    assert seen.keys() <= expected.keys()
    for token, logprob in seen.items():
        assert logprob == pytest.approx(expected[token], abs=1e-4)
    engine.close()


async def test_sampling_follows_the_distribution(demo_model: Path) -> None:
    engine = start(demo_model)
    choices = await complete(engine, engine.encode("47+38="), n=1000, max_tokens=1, temperature=1.0, seed=3)
    frequency: dict[int, float] = {}
    probability: dict[int, float] = {}
    for choice in choices:
        assert choice.token_ids is not None
        assert choice.logprobs is not None
        token = choice.token_ids[0]
        frequency[token] = frequency.get(token, 0) + 1 / 1000
        probability[token] = float(torch.tensor(choice.logprobs.token_logprobs[0]).exp())
    for token, share in frequency.items():
        assert abs(share - probability[token]) < 5 * (probability[token] / 1000) ** 0.5 + 0.005
    engine.close()


async def test_limits_stops_and_aborts(demo_model: Path) -> None:
    engine = start(demo_model, max_num_seqs=4)
    [choice] = await complete(engine, [5, 6], max_tokens=7, temperature=1.0, seed=1, stop_token_ids=tuple(range(3, 10)))
    assert choice.finish_reason == "length" or choice.token_ids[-1] in {1, *range(3, 10)}  # type: ignore[index]
    with pytest.raises(InvalidRequest, match="limit of 128"):
        await complete(engine, [5] * 100, max_tokens=29)
    with pytest.raises(InvalidRequest, match="token id 99"):
        await complete(engine, [99], max_tokens=1)
    with pytest.raises(InvalidRequest, match="empty"):
        await complete(engine, [], max_tokens=1)
    tasks = [asyncio.create_task(complete(engine, [5, 7 + i], n=3, max_tokens=120)) for i in range(8)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    rest = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in rest] == [True, False] * 4
    assert all(len(result) == 3 for result in rest[1::2])  # type: ignore[arg-type]
    await asyncio.sleep(0.2)
    assert engine.slots.used == 0
    assert engine.scheduler.waiting_count == 0
    engine.close()


async def test_weights_change_between_two_steps_of_running_requests(random_model: Path) -> None:
    """Every recorded log-probability is that of the recorded version, with the cache kept across the change."""
    engine = start(random_model)
    new = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    publisher = Publisher(dict(new.named_parameters()), "float32", "run", engine.info().model_fingerprint, None)
    try:
        before = await complete(engine, [5, 6, 7], max_tokens=20, temperature=0.0)
        running = [asyncio.create_task(complete(engine, p, n=2, max_tokens=100, seed=1)) for p in prompts(10, 3, 20)]
        manifest = publisher.publish(3).result()
        assert (await engine.stage(manifest)).state == "staged"
        with pytest.raises(Conflict, match="version 4"):
            await engine.commit("run", 4)
        assert (await engine.commit("run", 3)).version == 3
        for choices in await asyncio.gather(*running):
            for choice in choices:
                assert version_spans_total(choice.weight_versions or []) == len(choice.token_ids or [])
                assert {version for version, _ in choice.weight_versions or []} <= {0, 3}
        after = await complete(engine, [5, 6, 7], max_tokens=20, temperature=0.0)
        expected = new.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)[0, 3:]
        assert after[0].token_ids == expected.tolist()
        assert after[0].logprobs != before[0].logprobs
    finally:
        publisher.close()
        engine.close()


async def test_bad_manifests_leave_the_old_weights(demo_model: Path) -> None:
    engine = start(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    fingerprint = engine.info().model_fingerprint
    before = await complete(engine, [5, 6, 7], max_tokens=10, temperature=0.0)
    publisher = Publisher(dict(model.named_parameters()), "float32", "run", fingerprint, None)
    other = Publisher(dict(list(model.named_parameters())[1:]), "float32", "part", fingerprint, None)
    foreign = Publisher(dict(model.named_parameters()), "float32", "foreign", "somebody else", None)
    try:
        torn = publisher.publish(1).result()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        publisher.publish(3).result()  # the same buffer as version 1
        for manifest, complaint in [
            (torn, "checksum"),
            (other.publish(1).result(), "is missing"),
            (foreign.publish(1).result(), "somebody else"),
        ]:
            with pytest.raises(Conflict, match=complaint):
                await engine.stage(manifest)
            assert engine.status().state == "failed"
            with pytest.raises(Conflict, match="nothing is staged"):
                await engine.commit("run", 1)
        after = await complete(engine, [5, 6, 7], max_tokens=10, temperature=0.0)
        assert after == before
    finally:
        for each in (publisher, other, foreign):
            each.close()
        engine.close()
