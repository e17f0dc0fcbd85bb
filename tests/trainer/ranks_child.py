"""One rank of a few optimizer steps on random rollouts; rank 0 writes what came of them."""

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from outrider.algorithm.losses import LossSpec
from outrider.cli.entry import be_process
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, OptimizerConfig
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import blocks_of, local, whole_tensor
from outrider.trainer.step import StepComputer
from tests.trainer.build import batch_of, make_policy, random_samples

SETTINGS: dict[str, dict[str, Any]] = {
    "offload": {"fsdp_cpu_offload": True},
    "varlen": {"attn_impl": "varlen"},
    "hold": {"fsdp_reshard_after_forward": False},
    "reshard": {"fsdp_reshard_after_forward": True},
    "recomputed": {"gradient_checkpointing": True},
}


def train(ranks: Ranks, model: Path, beta: float, rows: int, budget: int, **settings: Any) -> dict[str, Any]:
    """Ten steps, the last six on two mini-batches of one batch, three times each: losses, norms, counts, divergences
    and gaps, and the weights after them."""
    policy = make_policy(model, ranks=ranks, **settings)
    # FSDP has changed their classes by now; what is compiled are these.
    assert len(blocks_of(policy.model)) == policy.config.get_text_config().num_hidden_layers
    # Which a publisher holds from before the first pass on.
    published, exchange = policy.published_tensors(), policy.exchange(ranks.seat(), "float32")
    assert policy.flat == (settings.get("attn_impl") == "varlen")
    reference = make_policy(model, trainable=False, ranks=ranks, **settings) if beta else None
    # Of gradients that are rounding alone, Adam makes steps of full size, unless epsilon is larger than they are.
    optimizer = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-3, adam_epsilon=1e-5))
    config = BatchConfig(per_device_train_batch_size=rows, max_tokens_per_micro_batch=budget or None)
    spec = LossSpec(loss_type="dapo", beta=beta, max_completion_length=16)
    computer = StepComputer(policy, reference, spec, config, "token_truncate", 2.0, 1.0, ranks)
    outcomes = []
    # An odd number of rollouts: they do not come out even over the ranks.
    parts = [batch_of(random_samples(13, seed=step, masks=True)) for step in range(6)]
    batches = [([part], 1) for part in parts[:4]] + [(parts[4:], 3)]
    for mini_batches, iterations in batches:
        works = computer.prepare(mini_batches, StepClock())
        for work in works * iterations:
            outcome = computer.gradients(work, StepClock())
            optimizer.step()
            optimizer.zero_grad()
            clipped = outcome.clip_low_share + outcome.clip_high_share
            outcomes.append(
                (outcome.loss, outcome.grad_norm, outcome.tokens, outcome.kl, outcome.logprob_gap_max, clipped)
            )
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(published[name], local(parameter)), name
    weights = {name: whole_tensor(value).detach() for name, value in policy.model.named_parameters()}
    exchange.refresh()
    check_published(ranks, exchange.tensors, policy.first_rows(ranks.seat()), weights)
    return {"outcomes": outcomes, "weights": weights}


def check_published(
    ranks: Ranks, rows: dict[str, Tensor], first_rows: dict[str, int], weights: dict[str, Tensor]
) -> None:
    """The ranks of the first copy have each row of each tensor once, and its values are right."""
    for name, whole in weights.items():
        assert torch.equal(rows[name], whole[first_rows[name] :][: len(rows[name])]), name
    spans = {name: [first_rows[name], first_rows[name] + len(rows[name])] for name in weights}
    said = [msgspec.json.decode(each) for each in ranks.gather(msgspec.json.encode(spans))][: ranks.shards]
    for name, whole in weights.items():
        found = sorted(each[name] for each in said if each[name][0] < each[name][1])
        assert [0, *(end for _, end in found)] == [*(start for start, _ in found), len(whole)], name


def main(model: str, output: str, copies: str, peers: str, *variants: str) -> None:
    """copies: of the model, each on a part of the ranks as if that were a node. peers: ranks that compute layers
    together."""
    torch.set_num_threads(1)
    if int(copies) > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(copies))
    ranks = Ranks(shard_across_nodes=copies == "1", peers=int(peers))
    found = {}
    for variant in variants:
        beta, rows, budget, *more = variant.split(",")
        if more and ranks.mesh is None:
            ranks = Ranks(shard_alone=True)
        settings = {name: value for word in more for name, value in SETTINGS[word].items()}
        found[variant] = train(ranks, Path(model), float(beta), int(rows), int(budget), **settings)
    if ranks.leads:
        torch.save(found, output)
    ranks.close()


if __name__ == "__main__":
    be_process(lambda: main(*sys.argv[1:]) or 0)
