"""Decoding steps on CUDA as recorded graphs: one launch instead of a thousand.

A step that only decodes is the same sequence of kernels every time, as long as the number of rows and of positions
attended over is the same; both are rounded up to powers of two, so that few graphs are ever recorded. For small models
the launches take longer than the kernels: there a graph is several times as fast.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from outrider.server.torch_engine.cache import SlotCache, round_positions
from outrider.server.torch_engine.span_attention import Decoding, SpanLayout

#: Rows of the smallest graph.
LEAST_ROWS = 16


@dataclass
class RecordedStep:
    """A graph and the memory it reads and writes. tokens, slots, positions: int64 [rows]; logits [rows, vocabulary]."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    slots: Tensor
    positions: Tensor
    logits: Tensor


class DecodingGraphs:
    """Records graphs when they are first needed, and forgets them when the cache moves.

    Rows of padding write into the cache's spare slot. Weights must stay where they are, see ``live_weights``.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self._steps: dict[tuple[int, int], RecordedStep] = {}
        self._recorded_for: Tensor | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """One token for each of the first slots. tokens, positions: int64 [n]. Returns logits [n, vocabulary], to be
        read before the next call."""
        if self._recorded_for is not self.cache.keys:
            self._steps.clear()
            self._recorded_for = self.cache.keys
        count = len(tokens)
        rows = min(max(LEAST_ROWS, 1 << (count - 1).bit_length()), self.cache.slots)
        context = min(round_positions(int(positions.max()) + 1), self.cache.positions)
        step = self._steps.get((rows, context))
        if step is None:
            step = self._steps[rows, context] = self._record(rows, context)
        inputs = np.zeros((3, rows), dtype=np.int64)
        inputs[0, :count], inputs[2, :count] = tokens, positions
        inputs[1] = self.cache.slots  # the spare slot
        inputs[1, :count] = np.arange(count)
        arrived = torch.from_numpy(inputs).to(self.cache.device)
        step.tokens.copy_(arrived[0])
        step.slots.copy_(arrived[1])
        step.positions.copy_(arrived[2])
        step.graph.replay()
        return step.logits[:count]

    def _record(self, rows: int, context: int) -> RecordedStep:
        tokens, slots, positions = (torch.zeros(rows, dtype=torch.long, device=self.cache.device) for _ in range(3))
        slots.fill_(self.cache.slots)

        def forward() -> Tensor:
            span = Decoding(0, rows, positions, context, self.cache.heads, self.cache.dtype)
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                step_layout=SpanLayout(self.cache, slots, positions, [span]),
            )
            return output.logits[0]

        # What libraries set up at a first call must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        return RecordedStep(graph, tokens, slots, positions, logits)
