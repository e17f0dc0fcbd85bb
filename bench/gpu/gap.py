"""How far a server's log-probabilities are from those of the same weights in Transformers."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel
from vllm_servers import Side

from outrider.contract import routes
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.generation import PACKED_MEDIA_TYPE, PackedChoice, PackedCompletion

KEY = "bench"


def ask(side: Side, prompt: list[int], new_tokens: int, **sampling: Any) -> PackedChoice:
    """One completion."""
    body = {"model": str(side.model), "prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, **sampling}  # fmt: skip
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "Accept": PACKED_MEDIA_TYPE}
    request = urllib.request.Request(side.url + routes.COMPLETIONS, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        [choice] = msgspec.msgpack.decode(answer.read(), type=PackedCompletion).choices
    return choice


def gap(
    side: Side, model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, ignore_eos: bool = True
) -> dict[str, float]:
    """Mean, tail and number over all tokens that the server draws."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(side, prompt, new_tokens, ignore_eos=ignore_eos), prompts))
    differences = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, theirs = unpack_ints(answer.token_ids).tolist(), unpack_floats(answer.logprobs)
            logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
            targets = torch.tensor(ids, device=model.device)[:, None]
            ours = torch.log_softmax(logits, -1).gather(1, targets)[:, 0].cpu().numpy()
            differences.append(np.abs(ours - theirs))
    found = np.concatenate(differences)
    return {
        "gap_mean": round(float(found.mean()), 5), "gap_p99": round(float(np.quantile(found, 0.99)), 5),
        "gap_max": round(float(found.max()), 5), "gap_tokens": len(found),
    }  # fmt: skip
