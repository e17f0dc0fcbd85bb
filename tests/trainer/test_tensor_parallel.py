"""Which models peers can compute together, and how what they do not say is noticed."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from outrider.contract.errors import UserError
from outrider.contract.manifest import Manifest, Piece, Segment, TensorEntry, joined
from outrider.trainer.tensor_parallel import STYLES, SUMMED, plan_of
from tests.server.models import CONFIGS


def empty(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("kind", "layers", "summed"), [("qwen3", 7, 2), ("qwen2", 7, 0), ("olmo2", 7, 0)])
def test_a_plan_names_the_layers_of_every_block(kind: str, layers: int, summed: int) -> None:
    """And nothing else: the projection onto the vocabulary is in the model's own."""
    styles = list(plan_of(empty(CONFIGS[kind]), 2).values())
    assert sum(style in STYLES for style in styles) == 3 * layers
    assert styles.count(SUMMED) == 3 * summed == len(styles) - 3 * layers


@pytest.mark.parametrize(
    ("config", "peers", "message"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), 2,
         "--tensor_parallel_size 2: GPT2LMHeadModel has no plan for it .*; leave it out"),
        (CONFIGS["qwen3"], 4,
         "--tensor_parallel_size 4: Qwen3ForCausalLM has num_key_value_heads 2, which 4 does not divide; give 1 or 2"),
        (Qwen2Config(hidden_size=32, num_hidden_layers=1, vocab_size=99, num_attention_heads=4, num_key_value_heads=4,
                     intermediate_size=18), 4, "has intermediate_size 18, which 4 does not divide; give 1 or 2"),
        (Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, num_experts=4, vocab_size=99), 2,
         "--tensor_parallel_size 2: Qwen3MoeForCausalLM has the style 'moe_tp_experts' of a .* for "
         r"model.layers.\*.mlp.experts, which this trainer does not take; leave it out"),
    ],
)  # fmt: skip
def test_what_peers_cannot_compute_is_named(config: PretrainedConfig, peers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(empty(config), peers)


def test_a_part_of_a_gradient_that_no_plan_speaks_of_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty(CONFIGS["qwen3"])
    rules = {path: style for path, style in model.tp_plan.items() if "k_norm" not in path}
    monkeypatch.setattr(type(model), "tp_plan", property(lambda self: rules))
    with pytest.raises(UserError, match=r"has no style for model.layers.\*.self_attn.k_norm, which this trainer"):
        plan_of(model, 2)


def test_pieces_lie_in_the_order_of_their_rows() -> None:
    """Not of the ranks: of two shards of two peers, the first peer of both has the first rows."""

    def part(rank: int) -> Manifest:
        piece = Piece(segment=0, offset=0, length=4, checksum=rank)
        names: Any = [TensorEntry(name=name, dtype="float32", shape=(4,), pieces=(piece,)) for name in ("a", "b")]
        segments = (Segment(host="h", path=f"/{rank}", length=4),)
        return Manifest(run_id="r", version=1, model_fingerprint="f", segments=segments, tensors=tuple(names))

    first_rows = [{"a": a, "b": b} for a, b in enumerate((0, 2, 1, 3))]
    whole = joined([part(rank) for rank in range(4)], first_rows)
    assert [[piece.segment for piece in tensor.pieces] for tensor in whole.tensors] == [[0, 1, 2, 3], [0, 2, 1, 3]]
    assert [piece.checksum for piece in whole.tensors[1].pieces] == [0, 2, 1, 3]
