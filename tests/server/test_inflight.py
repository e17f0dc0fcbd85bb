"""Weights change while requests run: with the recorded versions and the weights of those versions, every recorded
log-probability is reproduced by plain forward passes."""

import random
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from outrider.contract.control import Inflight
from tests.server.cores import Bench, Choice, reference

TOLERANCE = 2e-4


def replay(models: list[PreTrainedModel], prompt: list[int], choice: Choice, policy: Inflight) -> int:
    """Check every log-probability. Returns how often the context was read anew, beyond what the policy says.

    keep: token t was drawn by the model of its version, which read token t - 1; what was read before stays as it was,
    except where a sequence had been put back for lack of room: it is then read anew by the version in force.
    recompute: with every new version all is read anew.
    """
    cache, ids, again = DynamicCache(config=models[0].config), prompt, 0
    for place, (token, version) in enumerate(zip(choice.tokens, choice.token_versions, strict=True)):
        if policy == "recompute" and place and version != choice.token_versions[place - 1]:
            cache, ids = DynamicCache(config=models[0].config), prompt + choice.tokens[:place]
        found = choice.logprobs[place]
        if abs(logprob(models[version], ids, cache, token) - found) > TOLERANCE:
            again += 1
            cache = DynamicCache(config=models[0].config)
            everything = prompt + choice.tokens[:place]
            assert abs(logprob(models[version], everything, cache, token) - found) <= TOLERANCE
        ids = [token]
    return again


def logprob(model: PreTrainedModel, ids: list[int], cache: DynamicCache, token: int) -> float:
    """Log-probability of ``token`` after ``cache`` and ``ids``, which is appended to it."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    return float(torch.log_softmax(logits.float(), -1)[token])


@pytest.mark.parametrize("policy", ["keep", "recompute", "wait"])
@pytest.mark.parametrize("room", [64 * 128, 600])
def test_every_logprob_is_reproduced(random_model: Path, tmp_path: Path, policy: Inflight, room: int) -> None:
    """room: cache positions; with 600, sequences are put back between the commits as well."""
    models = [reference(random_model), reference(random_model, seed=1), reference(random_model, seed=2)]
    bench = Bench(random_model, cache_positions=room, prefix_blocks=16, max_num_batched_tokens=96)
    source = random.Random(3)
    asked: dict[int, list[int]] = {}

    def ask(count: int) -> None:
        for _ in range(count):
            prompt = [source.randrange(3, 99) for _ in range(source.randrange(1, 50))]
            number = bench.ask(prompt, n=2, seed=source.randrange(1000), max_tokens=40, ignore_eos=True)
            asked[number] = prompt

    ask(6)
    bench.steps(8)
    for version in (1, 2):
        bench.stage(dict(models[version].named_parameters()), tmp_path)
        ask(3)  # these are being prefilled, or wait
        bench.steps(1)
        if policy == "wait":
            while not bench.core.close_admission():
                bench.steps(1)
        bench.core.commit(version, policy)
        bench.steps(10)
    ask(2)
    bench.steps()
    mixed = again = 0
    for number, prompt in asked.items():
        for choice in bench.choices[number]:
            assert len(choice.token_versions) == len(choice.tokens) == 40
            mixed += len(set(choice.token_versions)) > 1
            again += replay(models, prompt, choice, policy)
    assert (mixed == 0) == (policy == "wait")
    assert again <= bench.core.scheduler.preemptions
    assert (bench.core.scheduler.preemptions > 0) == (room == 600)
