"""What every rank of a run has: its share of the model and of the optimizer's state, and its segments."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from outrider.contract.feed import WeightNode
from outrider.contract.identity import host_identity
from outrider.contract.manifest import DTypeName, Manifest, joined
from outrider.trainer.model import Policy
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.plan import loss_spec
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import load_rows
from outrider.trainer.spec import TrainerSpec
from outrider.trainer.step import StepComputer
from outrider.weights.publish import Publisher


@dataclass(frozen=True)
class Parts:
    """The policy, its optimizer, and what computes a step's gradients."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    computer: StepComputer

    def set_learning_rate(self, rate: float) -> None:
        """For the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def load_parts(spec: TrainerSpec, ranks: Ranks, checkpoint: Path | None) -> Parts:
    """The model of --model, shared out over the ranks, with what ``checkpoint`` has of it. Raises UserError."""
    chunk = spec.loss.logprob_chunk_size
    policy = Policy(spec.model, spec.model.model, spec.temperature, chunk, trainable=True, ranks=ranks)
    reference = None
    if spec.loss.beta > 0:
        reference = Policy(
            spec.model, spec.model.model, spec.temperature, chunk, trainable=False, ranks=ranks, flat=policy.flat
        )
    optimizer = make_optimizer(policy.model, spec.optimizer)
    if checkpoint is not None:
        load_rows(checkpoint, policy.model, optimizer)
    computer = StepComputer(
        policy,
        reference,
        loss_spec(spec),
        spec.batch,
        spec.correction_mode,
        spec.loss.rollout_importance_sampling_threshold,
        spec.optimizer.max_grad_norm,
        ranks,
        spec.loss.log_entropy,
    )
    return Parts(policy, optimizer, computer)


class Description:
    """Where the ranks put together the manifest of a version: rank 0 announces it when all have described their
    rows."""

    def __init__(self, ranks: Ranks, run_id: str, policy: Policy) -> None:
        self._ranks, self._run_id = ranks, run_id
        self._first_rows = [policy.first_rows(ranks.seat(rank)) for rank in range(ranks.shards)]

    def give(self, part: Manifest) -> None:
        """This rank's rows; on any rank but the first."""
        self._ranks.put(self._name(part.version, self._ranks.rank), msgspec.json.encode(part).decode())

    def whole(self, part: Manifest) -> Manifest:
        """All ranks' rows. part: those of rank 0. Waits for the others; RuntimeError when they do not come."""
        others = [
            msgspec.json.decode(self._ranks.take(self._name(part.version, rank)), type=Manifest)
            for rank in range(1, self._ranks.shards)
        ]
        return joined([part, *others], self._first_rows)

    def _name(self, version: int, rank: int) -> str:
        return f"{self._run_id}/{version}/{rank}"


def serve_weight_node(ranks: Ranks, run_id: str, url: str) -> None:
    """This node serves its segments under ``url``: its first rank lets the others know."""
    found = WeightNode(node=ranks.node, host=host_identity(), name=socket.gethostname(), url=url)
    ranks.put(f"{run_id}/node {ranks.node}", msgspec.json.encode(found).decode())


def weight_node(ranks: Ranks, run_id: str, node: int) -> WeightNode:
    """A node that serves its segments, once it does. RuntimeError when it does not come to that."""
    return msgspec.json.decode(ranks.see(f"{run_id}/node {node}"), type=WeightNode)


def weight_nodes(ranks: Ranks, run_id: str, segment_url: str | None) -> list[WeightNode]:
    """All nodes that serve segments. segment_url: under which rank 0's does."""
    others = [weight_node(ranks, run_id, node) for node in range(1, ranks.publishing_nodes)]
    if segment_url is None:
        return others
    return [WeightNode(node=0, host=host_identity(), name=socket.gethostname(), url=segment_url), *others]


def make_publisher(
    policy: Policy,
    dtype: DTypeName,
    run_id: str,
    segment_url: str | None,
    announce: Callable[[Manifest], None],
    ranks: Ranks,
) -> Publisher:
    """Of this rank's rows. Only ranks of the first copy of the model have something to publish."""
    if not ranks.in_first_copy:
        return Publisher({}, dtype, run_id, policy.fingerprint, None)
    exchange = policy.exchange(ranks.seat(), dtype)
    return Publisher(
        exchange.tensors,
        dtype,
        run_id,
        policy.fingerprint,
        segment_url,
        announce,
        policy.published_shapes(),
        exchange.refresh,
    )
