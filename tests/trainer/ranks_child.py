"""One rank of a few optimizer steps on random rollouts; rank 0 writes what came of them."""

import sys
from pathlib import Path

import torch

from outrider.algorithm.losses import LossSpec
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, OptimizerConfig
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import whole_tensor
from outrider.trainer.step import StepComputer
from tests.trainer.build import batch_of, make_policy, random_samples


def main(model: str, beta: str, rows: str, budget: str, output: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks()
    policy = make_policy(Path(model))
    reference = make_policy(Path(model), trainable=False) if float(beta) else None
    if ranks.mesh is not None:
        policy.shard(ranks.mesh)
        if reference is not None:
            reference.shard(ranks.mesh)
    optimizer = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-3))
    config = BatchConfig(per_device_train_batch_size=int(rows), max_tokens_per_micro_batch=int(budget) or None)
    spec = LossSpec(loss_type="dapo", beta=float(beta), max_completion_length=16)
    computer = StepComputer(policy, reference, spec, config, "token_truncate", 2.0, 1.0, ranks)
    outcomes = []
    for step in range(10):
        # An odd number of rollouts: they do not come out even over the ranks.
        outcome = computer.gradients(batch_of(random_samples(13, seed=step, masks=True)), StepClock())
        optimizer.step()
        optimizer.zero_grad()
        outcomes.append((outcome.loss, outcome.grad_norm, outcome.tokens, outcome.kl, outcome.logprob_gap_max))
    weights = {name: whole_tensor(value).detach() for name, value in policy.model.named_parameters()}
    if ranks.leads:
        torch.save({"outcomes": outcomes, "weights": weights}, output)
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
