"""The embedded engine with its replicas as the processes they are: balance, weights on all of them, deaths."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.errors import UserError
from outrider.contract.sampling import SamplingParams
from outrider.server.config import RolloutConfig
from outrider.server.engine import Conflict, InvalidRequest, Unavailable
from outrider.server.torch_engine.engine import TorchEngine
from outrider.server.torch_engine.loading import plan_engine
from outrider.weights.publish import Publisher
from tests.server.cores import Choice

pytestmark = pytest.mark.asyncio(loop_scope="module")


def build(model: Path, **options: object) -> TorchEngine:
    settings = {"max_num_seqs": 32, "max_model_len": 512, "threads": 2, **options}
    config = RolloutConfig(model=str(model), **settings)  # type: ignore[arg-type]
    return TorchEngine(plan_engine(config, AutoTokenizer.from_pretrained(model)), seed=0, key="key")


async def complete(
    engine: TorchEngine, prompt: list[int], n: int = 1, stream: bool = False, **sampling: object
) -> list[Choice]:
    choices = [Choice() for _ in range(n)]
    async for delta in engine.generate(prompt, SamplingParams(**sampling), n, "test", stream):  # type: ignore[arg-type]
        choice = choices[delta.index]
        choice.tokens += unpack_ints(delta.token_ids).tolist()
        choice.logprobs += unpack_floats(delta.logprobs).tolist()
        choice.versions += delta.versions
        choice.reason = delta.finish_reason
    return choices


@pytest.fixture(scope="module")
def changed(endless_model: Path) -> torch.nn.Module:
    """The model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(endless_model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "o_proj" not in name and "down_proj" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
async def engine(endless_model: Path) -> AsyncIterator[TorchEngine]:
    """Two replicas of one thread each; tests leave any weights behind, and commit those that they rely on."""
    engine = build(endless_model)
    await engine.start()
    assert len(engine.fleet.replicas) == 2
    yield engine
    await engine.close()


async def settle(engine: TorchEngine) -> None:
    """Wait until both replicas serve and nothing runs."""
    async with asyncio.timeout(60):
        while not all(replica.ready for replica in engine.fleet.replicas) or engine.load().running:
            await asyncio.sleep(0.05)


def kill(engine: TorchEngine, index: int) -> None:
    process = engine.fleet.replicas[index].process
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


async def test_both_replicas_work(engine: TorchEngine) -> None:
    tasks = [asyncio.create_task(complete(engine, [5, 6 + i], n=2, max_tokens=200)) for i in range(12)]
    most = [0, 0]
    while not all(task.done() for task in tasks):
        most = [max(before, len(replica.requests)) for before, replica in zip(most, engine.fleet.replicas, strict=True)]
        await asyncio.sleep(0.001)
    for choices in await asyncio.gather(*tasks):
        assert [(len(c.tokens), c.reason) for c in choices] == [(200, "length")] * 2
    assert min(most) >= 4
    load = engine.load()
    assert load.generated_tokens >= 24 * 200
    assert (load.running, load.waiting) == (0, 0)


async def test_a_seed_gives_the_same_tokens_on_every_replica(engine: TorchEngine) -> None:
    answers = await asyncio.gather(*(complete(engine, [5, 6, 7], n=2, max_tokens=40, seed=3) for _ in range(40)))
    assert all(answer == answers[0] for answer in answers)


async def test_what_cannot_be_served_is_refused(engine: TorchEngine) -> None:
    for prompt, sampling, message in [
        ([5] * 400, {"max_tokens": 113}, "limit of 512"),
        ([99], {}, "token id 99 is outside the vocabulary, 0 to 98"),
        ([-1], {}, "token id -1"),
        ([], {}, "empty"),
        ([5], {"stop_token_ids": (5, 200)}, "stop_token_ids: token id 200"),
        ([5], {"stop_token_ids": tuple(range(40))}, "at most 15"),
        ([5], {"logit_bias": ((100, 1.0),)}, "logit_bias: token id 100"),
        ([5], {"min_tokens": 20}, "min_tokens: must be between 0 and max_tokens, 16"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            await complete(engine, prompt, **sampling)  # type: ignore[arg-type]


async def test_closing_a_generation_frees_its_place(engine: TorchEngine) -> None:
    generations = [engine.generate([5], SamplingParams(max_tokens=500), 8, "x", False) for _ in range(8)]
    await asyncio.sleep(0.3)
    assert engine.load().waiting > 0
    for generation in generations:
        generation.close()
        generation.close()
    await settle(engine)
    assert engine._requests == {}
    assert [replica.sequences for replica in engine.fleet.replicas] == [0, 0]


async def test_a_failed_generation_frees_its_place(engine: TorchEngine) -> None:
    generation = engine.generate([5], SamplingParams(max_tokens=500), 4, "x", False)
    generation.fail(Unavailable("for a test"))
    with pytest.raises(Unavailable, match="for a test"):
        [delta async for delta in generation]
    await settle(engine)
    assert [replica.sequences for replica in engine.fleet.replicas] == [0, 0]


async def test_one_choice_can_be_ended(engine: TorchEngine) -> None:
    generation = engine.generate([5], SamplingParams(max_tokens=100), 2, "x", True)
    counts = [0, 0]
    async for delta in generation:
        counts[delta.index] += len(unpack_ints(delta.token_ids))
        if counts[0] >= 10:
            generation.end_choice(0)
    assert counts[1] == 100
    assert 10 <= counts[0] < 100


async def test_weights_change_on_every_replica(engine: TorchEngine, changed: torch.nn.Module) -> None:
    publisher = Publisher(dict(changed.named_parameters()), "float32", "run", engine.info().model_fingerprint, None)
    try:
        running = [asyncio.create_task(complete(engine, [5, 6 + i], n=2, max_tokens=300)) for i in range(8)]
        assert (await engine.stage(publisher.publish(3).result())).state == "staged"
        with pytest.raises(Conflict, match="version 4"):
            await engine.commit("run", 4, "keep")
        assert (await engine.commit("run", 3, "keep")).version == 3
        for choices in await asyncio.gather(*running):
            assert {version for choice in choices for version, _ in choice.versions} <= {0, 3}
        expected = changed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)[0, 3:].tolist()  # type: ignore[operator]
        answers = await asyncio.gather(
            *(complete(engine, [5, 6, 7], max_tokens=20, temperature=0.0) for _ in range(40))
        )
        assert all(choice.tokens == expected for [choice] in answers)
        kill(engine, 0)  # its successor must come up with version 3, though the trainer has gone on
        publisher.publish(4).result()
        publisher.publish(5).result()
        await asyncio.sleep(0.3)
        await settle(engine)
        answers = await asyncio.gather(
            *(complete(engine, [5, 6, 7], max_tokens=20, temperature=0.0) for _ in range(40))
        )
        assert all(choice.tokens == expected and choice.versions == [(3, 20)] for [choice] in answers)
    finally:
        publisher.close()


async def test_wait_lets_what_runs_end_first(engine: TorchEngine, changed: torch.nn.Module) -> None:
    publisher = Publisher(dict(changed.named_parameters()), "float32", "wait", engine.info().model_fingerprint, None)
    try:
        running = [asyncio.create_task(complete(engine, [5, 6 + i], max_tokens=300)) for i in range(8)]
        await asyncio.sleep(0.1)
        await engine.stage(publisher.publish(7).result())
        commit = asyncio.create_task(engine.commit("wait", 7, "wait"))
        await asyncio.sleep(0.02)  # until it has closed the door
        later = await complete(engine, [5], max_tokens=5)
        assert (await commit).version == 7
        for [choice] in await asyncio.gather(*running):
            assert len(choice.versions) == 1
            assert choice.versions[0][0] != 7
        assert later[0].versions == [(7, 5)]
    finally:
        publisher.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_dead_replicas_requests_are_issued_again(engine: TorchEngine, stream: bool) -> None:
    expected = [await complete(engine, [5, 6 + i], n=2, max_tokens=500, seed=i) for i in range(8)]
    tasks = [
        asyncio.create_task(complete(engine, [5, 6 + i], n=2, max_tokens=500, seed=i, stream=stream)) for i in range(8)
    ]
    await asyncio.sleep(0.15)
    restarts = engine.load().restarts
    kill(engine, 1)
    for choices, wanted in zip(await asyncio.gather(*tasks), expected, strict=True):
        assert [(c.tokens, c.logprobs, c.reason) for c in choices] == [(c.tokens, c.logprobs, c.reason) for c in wanted]
    await settle(engine)
    assert engine.load().restarts == restarts + 1


async def test_bad_manifests_leave_the_old_weights(engine: TorchEngine, changed: torch.nn.Module) -> None:
    fingerprint, version = engine.info().model_fingerprint, engine.status().version
    before = await complete(engine, [5, 6, 7], max_tokens=10, temperature=0.0)
    weights = {name: parameter.detach().clone() for name, parameter in changed.named_parameters()}
    publisher = Publisher(weights, "float32", "run", fingerprint, None)
    other = Publisher(dict(list(weights.items())[1:]), "float32", "part", fingerprint, None)
    foreign = Publisher(weights, "float32", "foreign", "somebody else", None)
    try:
        torn = publisher.publish(21).result()
        for tensor in weights.values():
            tensor.add_(1.0)
        publisher.publish(22).result()
        publisher.publish(23).result()  # the same buffer as version 21
        for manifest, complaint in [
            (torn, "checksum"),
            (other.publish(21).result(), "is missing"),
            (foreign.publish(21).result(), "somebody else"),
        ]:
            with pytest.raises(Conflict, match=complaint):
                await engine.stage(manifest)
            assert engine.status().state == "failed"
            with pytest.raises(Conflict, match="nothing is staged"):
                await engine.commit("run", 21, "keep")
        assert await complete(engine, [5, 6, 7], max_tokens=10, temperature=0.0) == before
        assert engine.status().version == version
    finally:
        for each in (publisher, other, foreign):
            each.close()


async def test_replicas_that_die_again_and_again_end_the_engine(endless_model: Path) -> None:
    engine = build(endless_model, data_parallel_size=1, threads=1)
    await engine.start()
    try:
        task = asyncio.create_task(complete(engine, [5], max_tokens=500, n=16))
        async with asyncio.timeout(120):
            while not engine.failure():
                process = engine.fleet.replicas[0].process
                if process is not None and process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):  # it has been reaped since
                        os.kill(process.pid, signal.SIGKILL)
                await asyncio.sleep(0.3)
        with pytest.raises(Unavailable, match="died"):
            await task
        with pytest.raises(Unavailable, match="replica 0 died 6 times in a row"):
            engine.generate([5], SamplingParams(), 1, "x", False)
    finally:
        await engine.close()


async def test_a_model_that_cannot_be_loaded_is_the_users_to_mend(endless_model: Path, tmp_path: Path) -> None:
    shutil.copytree(endless_model, tmp_path, ignore=lambda *_: ["model.safetensors"], dirs_exist_ok=True)
    engine = build(tmp_path, threads=1)
    with pytest.raises(UserError, match="cannot be loaded"):
        await engine.start()
