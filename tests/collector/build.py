"""Groups and specifications for tests of the collector."""

from pathlib import Path
from typing import Any

import outrider.demo
from outrider.collector.config import (
    CollectorSpec,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    SamplingConfig,
    ServersConfig,
    StalenessConfig,
)
from outrider.collector.groups import Group
from outrider.contract.generation import VersionSpan
from outrider.environments.base import Rollout, logprob_array, token_array
from outrider.rewards.settings import RewardSettings

#: Beside the package; importing the tests' models would load torch.
DEMO_MODEL = Path(outrider.demo.__file__).parent / "model"


def rollout(
    tokens: list[int],
    *,
    prompt: tuple[int, ...] = (5, 6),
    text: str = "text",
    versions: list[VersionSpan] | None = None,
    mask: bytes | None = None,
) -> Rollout:
    """A rollout whose log-probabilities are exact in float32."""
    return Rollout(
        prompt=token_array(prompt),
        tokens=token_array(tokens),
        logprobs=logprob_array([-token / 8 for token in tokens]),
        versions=[(0, len(tokens))] if versions is None else versions,
        text=text,
        finish_reason="stop",
        server="http://127.0.0.1:1",
        mask=mask,
    )


def group(group_id: int, rewards: tuple[float, ...] = (0.0, 1.0), deadline: int = 0) -> Group:
    """A finished group with one rollout for each reward."""
    rollouts = [rollout([group_id + 3, place + 3]) for place in range(len(rewards))]
    return Group(group_id, deadline, f"prompt {group_id}", rollouts, list(rewards), {"scripted": list(rewards)})


def collector_spec(**given: Any) -> CollectorSpec:
    """A small run of the demo's model. given: fields of the specification, or of its sections by name."""
    sections: dict[str, tuple[type, dict[str, Any]]] = {
        "servers": (ServersConfig, {}),
        "data": (DataConfig, {"dataset": ("data.jsonl",), "dataset_shuffle": False}),
        "sampling": (SamplingConfig, {"num_generations": 4, "temperature": 1.0, "max_completion_length": 8}),
        "rewards": (RewardConfig, {"reward_funcs": ("exact_match",)}),
        "staleness": (StalenessConfig, {}),
        "evaluation": (EvaluationConfig, {}),
    }
    fields: dict[str, Any] = {
        "run_id": "run", "resume": False, "model": str(DEMO_MODEL), "trust_remote_code": False, "server_urls": [],
        "reward_weights": (1.0,), "reward_settings": RewardSettings(), "max_staleness": 1, "groups_per_batch": 2,
        "mini_batches": 1, "seed": 0, "ledger": "", "ledger_keep_steps": 100, "drop_zero_variance": True,
    }  # fmt: skip
    for name, (section, defaults) in sections.items():
        own = {key: given.pop(key) for key in set(given) - set(fields) if key in section.__struct_fields__}  # type: ignore[attr-defined]
        fields[name] = section(**{**defaults, **own})
    return CollectorSpec(**{**fields, **given})
