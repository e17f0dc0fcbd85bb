"""Whether the versions that a server records of tokens in flight are those that drew them, on a GPU.

Two sets of weights take turns while requests run; then plain forward passes of Transformers, by the model of each
token's recorded version, say how far the recorded log-probabilities are off. The last token before a change and the
first one after it, whose version is the one that could be wrong, are reported for themselves; and what they would have
been off, had the version changed one token sooner or later than is recorded.
"""

import itertools
import random
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from gap import ask
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vllm_servers import Side

from outrider.contract import routes
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.generation import PackedChoice
from outrider.weights.publish import Publisher

sys.path.insert(0, str(Path(__file__).parents[1]))
from updates import call, staged_update

#: An even number, so that the next policy begins with an even version.
UPDATES = 8
REQUESTS = 48


def versions_in_flight(side: Side, models: list[Path], policy: Inflight, new_tokens: tuple[int, int]) -> dict[str, Any]:
    """models: two sets of weights for one shape; even versions, one of which the server has, are the first one.
    new_tokens: of the shortest and the longest request."""
    side.wait()
    info = msgspec.json.decode(call(side.url, routes.INFO), type=ServerInfo)
    device, dtype = ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    loaded = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval().to(device)
        for path in models
    ]
    publishers = [
        Publisher(dict(model.named_parameters()), info.torch_dtype, uuid.uuid4().hex[:12], info.model_fingerprint, None)  # type: ignore[arg-type]
        for model in loaded
    ]
    source = random.Random(5)
    roots = [[source.randrange(3, 99) for _ in range(40)] for _ in range(3)]
    prompts = [[*source.choice(roots)[: source.randrange(20, 40)], source.randrange(3, 99)] for _ in range(REQUESTS)]
    held = msgspec.json.decode(call(side.url, routes.STATUS), type=WeightStatus).version
    try:
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = [pool.submit(ask, side, prompt, source.randrange(*new_tokens)) for prompt in prompts]
            for version in range(held + 1, held + 1 + UPDATES):
                staged_update(side.url, publishers[version % 2].publish(version).result(60), policy)
                time.sleep(0.1 * source.random())
            choices = [answer.result(120) for answer in answers]
    finally:
        for publisher in publishers:
            publisher.close()
    return report(loaded, prompts, choices, policy)


def report(
    models: list[PreTrainedModel], prompts: list[list[int]], choices: list[PackedChoice], policy: Inflight
) -> dict[str, Any]:
    """Figures over all tokens, and over those beside changes."""
    off, beside, moved = [], [], []
    for prompt, choice in zip(prompts, choices, strict=True):
        versions = [version for version, count in choice.weight_versions for _ in range(count)]
        found = replay(models, prompt, choice, versions, policy)
        off.append(found)
        changes = [place for place in range(1, len(versions)) if versions[place] != versions[place - 1]]
        beside += [found[place - by] for place in changes for by in (0, 1)]
        if changes and policy == "keep":
            sooner = replay(models, prompt, choice, [*versions[1:], versions[-1]], policy)
            later = replay(models, prompt, choice, [versions[0], *versions[:-1]], policy)
            moved += [gaps[place - by] for place in changes for gaps, by in ((sooner, 1), (later, 0))]
    everywhere = np.concatenate(off)
    return {
        "tokens": len(everywhere), "changes": len(beside) // 2,
        "gap_mean": round(float(everywhere.mean()), 5), "gap_max": round(float(everywhere.max()), 5),
        "gap_beside_changes": round(float(np.mean(beside or [0.0])), 5),
        "gap_beside_changes_max": round(float(np.max(beside or [0.0])), 5),
        "gap_if_one_token_off": round(float(np.mean(moved)), 5) if moved else None,
    }  # fmt: skip


@torch.inference_mode()
def replay(
    models: list[PreTrainedModel], prompt: list[int], choice: PackedChoice, versions: list[int], policy: Inflight
) -> np.ndarray:
    """How far each log-probability is off, [tokens]. A token was drawn by the model of its version, which read the one
    before it; what was read before stays as it was, or is read anew where ``policy`` is ``recompute``."""
    tokens, theirs = unpack_ints(choice.token_ids).tolist(), unpack_floats(choice.logprobs)
    everything, ours, place = [*prompt, *tokens], [], 0
    cache, read = DynamicCache(config=models[0].config), 0
    for version, run in itertools.groupby(versions):
        if policy == "recompute" and place:
            cache, read = DynamicCache(config=models[0].config), 0
        model, count = models[version % 2], len(list(run))
        end = len(prompt) + place + count - 1
        ids = torch.tensor([everything[read:end]], device=model.device)
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -count:].float()
        targets = torch.tensor(tokens[place : place + count], device=model.device)[:, None]
        ours.append(torch.log_softmax(logits, -1).gather(1, targets)[:, 0].cpu().numpy())
        place, read = place + count, end
    return np.abs(np.concatenate(ours) - theirs)
