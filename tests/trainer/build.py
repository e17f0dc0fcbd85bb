"""Samples, batches and policies for the trainer's tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.feed import MiniBatch, Sample
from outrider.trainer.config import ModelConfig
from outrider.trainer.model import Policy
from outrider.trainer.packing import MicroBatch, collate
from outrider.trainer.ranks import Ranks

VOCABULARY = 99


def sample(prompt: Sequence[int], completion: Sequence[int], **fields: Any) -> Sample:
    """A rollout; log-probabilities and advantage are 0 and every token is trained unless fields say otherwise."""
    mask = fields.pop("mask", None)
    return Sample(
        group=fields.pop("group", 0),
        prompt=pack_ints(prompt),
        completion=pack_ints(completion),
        logprobs=pack_floats(fields.pop("logprobs", [0.0] * len(completion))),
        advantage=fields.pop("advantage", 0.0),
        mask=b"" if mask is None else bytes(mask),
    )


def random_samples(count: int, seed: int, masks: bool = False) -> list[Sample]:
    """Rollouts of unequal lengths, two to a prompt; advantages of both signs, sampler log-probabilities near 0.

    masks: every other rollout has tokens that an environment wrote.
    """
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        if index % 2 == 0:
            prompt = draw.integers(2, VOCABULARY, int(draw.integers(1, 9)))
        length = int(draw.integers(1, 12))
        mask = None
        if masks and index % 2:
            mask = [int(bit) for bit in draw.integers(0, 2, length)]
            mask[-1] = 1
        found.append(
            sample(
                prompt,
                draw.integers(2, VOCABULARY, length),
                group=index // 2,
                logprobs=draw.normal(-4.0, 1.0, length),
                advantage=float(draw.normal()),
                mask=mask,
            )
        )
    return found


def trained_tokens(found: Sample) -> int:
    return sum(found.mask) if found.mask else len(found.completion) // 4


def batch_of(samples: list[Sample], sequences: int | None = None, tokens: int | None = None) -> MiniBatch:
    """The mini-batch that the collector would send, with the counts of ``samples`` unless others are given."""
    return MiniBatch(
        samples=samples,
        sequences=len(samples) if sequences is None else sequences,
        tokens=sum(map(trained_tokens, samples)) if tokens is None else tokens,
    )


def one_a_row(samples: Sequence[Sample]) -> MicroBatch:
    """All of them as one micro-batch, each in a row of its own."""
    return collate([[sample] for sample in samples], torch.device("cpu"))


def make_policy(
    directory: Path,
    temperature: float = 1.0,
    chunk: int = 2048,
    trainable: bool = True,
    ranks: Ranks | None = None,
    **model: Any,
) -> Policy:
    """A policy on the CPU, whatever machine this is, so that its numbers can be compared closely."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        config = ModelConfig(model=str(directory), **model)
        return Policy(config, str(directory), temperature, chunk, trainable, ranks)
    finally:
        torch.cuda.is_available = available
