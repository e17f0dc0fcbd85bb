"""Temperatures above 2, where vLLM's own requests end: a logits processor that divides by what is left of them.

It works with the first generation of vLLM's model runners, which is that of CPUs; the second one has no such
processors, and there a server refuses such temperatures.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

#: Highest temperature of a vLLM request.
LIMIT = 2.0
#: Key under which a request brings ``[divisor, min_p]``; vLLM's own min-p would come before the division.
KEY = "outrider_hot"


class HotTemperatures(LogitsProcessor):
    """Applied after temperature and before top-k and top-p."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[float, float]] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, *_ in batch_update.added:
            self._set(row, _wanted(params))
        for source, target, direction in batch_update.moved:
            there = self._rows.get(target) if direction == MoveDirectionality.SWAP else None
            self._set(target, self._rows.get(source))
            self._set(source, there)

    def _set(self, row: int, wanted: tuple[float, float] | None) -> None:
        if wanted is None:
            self._rows.pop(row, None)
        else:
            self._rows[row] = wanted

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [sequences, vocabulary], changed in place."""
        for row, (divisor, min_p) in self._rows.items():
            logits[row] /= divisor
            if min_p > 0:
                probabilities = logits[row].softmax(-1)
                logits[row].masked_fill_(probabilities < min_p * probabilities.max(), -torch.inf)
        return logits


def _wanted(params: SamplingParams) -> tuple[float, float] | None:
    given = (params.extra_args or {}).get(KEY)
    return None if given is None else (float(given[0]), float(given[1]))
