"""What a server says when it cannot be had with the flags given, and what it makes of those it can."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig
from outrider.server.model_facts import stop_tokens
from outrider.server.torch_engine.loading import EnginePlan, plan_engine


def plan(model: Path, **flags: object) -> EnginePlan:
    config = RolloutConfig(**{"model": str(model), **flags})  # type: ignore[arg-type]
    return plan_engine(config, AutoTokenizer.from_pretrained(model))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_model_len": 100_000}, "--max_model_len 100000: .* at most 256"),
        ({"kv_cache_gib": 1e-6}, "--kv_cache_gib 1e-06: one sequence of 256 tokens on each of 2 replicas needs"),
    ],
)
def test_the_flag_at_fault_is_named(demo_model: Path, flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(demo_model, threads=2, **flags)


def test_a_small_model_gets_a_replica_a_thread(demo_model: Path) -> None:
    replicas = plan(demo_model, threads=3, max_num_seqs=64).replicas
    assert [(r.threads, r.max_num_seqs) for r in replicas] == [(1, 22)] * 3
    assert [r.threads for r in plan(demo_model, threads=4, data_parallel_size=2).replicas] == [2, 2]


def test_the_cache_stays_within_its_bound(demo_model: Path) -> None:
    """Fewer positions than every slot at its longest; sequences are put back when they run out."""
    small, large = plan(demo_model, threads=1, kv_cache_gib=0.01), plan(demo_model, threads=1)
    assert 256 <= small.replicas[0].cache_positions < large.replicas[0].cache_positions == 256 * 256
    assert plan(demo_model, threads=1, enable_prefix_caching=False).replicas[0].prefix_blocks == 0


def test_stop_tokens_of_all_declarations_count() -> None:
    assert stop_tokens(None, 1, [2, 3], [1]) == {1, 2, 3}
