"""What a server says when it cannot be had with the flags given."""

from pathlib import Path

import pytest

from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig
from outrider.server.torch_engine.loading import load_engine, stop_tokens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "/no/such/model"}, "--model /no/such/model: cannot be loaded"),
        ({"max_model_len": 100_000}, "--max_model_len 100000: .* at most 256"),
        ({"kv_cache_gib": 1e-6}, "--kv_cache_gib 1e-06: one sequence of 256 tokens needs"),
    ],
)
def test_the_flag_at_fault_is_named(demo_model: Path, flags: dict[str, object], message: str) -> None:
    config = RolloutConfig(**{"model": str(demo_model), "threads": 1, **flags})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        load_engine(config, "key")


def test_a_small_cache_means_fewer_sequences_at_once(demo_model: Path) -> None:
    """Every sequence admitted fits at its full length, so that none has ever to be thrown out."""
    engine = load_engine(RolloutConfig(model=str(demo_model), threads=1, kv_cache_gib=0.01), "key")
    try:
        assert 1 <= engine.info().max_num_seqs < 256
    finally:
        engine.close()


def test_stop_tokens_of_all_declarations_count() -> None:
    assert stop_tokens(None, 1, [2, 3], [1]) == {1, 2, 3}
