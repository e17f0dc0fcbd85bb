"""Which rollouts share a row and a micro-batch, and the tensors that they become."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.feed import Sample
from outrider.trainer.sharing import PADDING, PROMPT, Sharing


@dataclass(frozen=True)
class Rows:
    """Rows padded on the right. part: int64 [rows, width], PROMPT, the number of the completion in its row counted from
    1, or PADDING. shared: whether a row holds several rollouts."""

    part: Tensor
    shared: bool


@dataclass(frozen=True)
class Flat:
    """One row of sequences without padding between them. bounds: int32 [sequences + 1], where they begin, and where the
    last one ends. longest: tokens of the longest, or a few more."""

    bounds: Tensor
    longest: int


@dataclass
class MicroBatch:
    """Rows of tokens, and the trained tokens as flat vectors.

    A row is a prompt followed by one or more of its completions, each without its last token, which predicts nothing;
    or, where the layout is flat, the only row has all rollouts, each after its prompt.

    input_ids, positions: int64 [rows, width]. positions: of a token in its own rollout. where: int64 [tokens], places
    of the hidden states that predict the trained tokens in the flattened [rows x width]. targets, rollout_logprobs,
    sequence: [tokens]; sequence is the rollout a token belongs to. advantages: float32 [rollouts].
    """

    input_ids: Tensor
    positions: Tensor
    layout: Rows | Flat
    where: Tensor
    targets: Tensor
    rollout_logprobs: Tensor
    sequence: Tensor
    advantages: Tensor

    @property
    def rollouts(self) -> int:
        return self.advantages.shape[0]


def form_micro_batches(
    samples: Sequence[Sample], rollouts: int, max_tokens: int | None, sharing: Sharing | None
) -> list[list[list[int]]]:
    """Share out rollouts over rows and rows over micro-batches, alike widths together so that little is padded.

    rollouts: of a micro-batch, unless ``max_tokens`` gives a budget of padded tokens (a single longer rollout still
    gets a micro-batch of its own). sharing: None gives every rollout a row of its own. Returns micro-batches of rows
    of indices.
    """
    # The mask of a shared row takes the place of the model's own: what a sliding window cuts needs the model's.
    longest = math.inf if sharing is None or sharing.window is None else sharing.window
    alone = [i for i, s in enumerate(samples) if sharing is None or _prompt(s) + _completion(s) > longest]
    batches = _group_rows(samples, [[index] for index in alone], rollouts, max_tokens)
    if sharing is not None:
        together = sorted(set(range(len(samples))).difference(alone))
        rows = _form_rows(samples, together, rollouts, max_tokens, sharing.break_even)
        batches += _group_rows(samples, rows, rollouts, max_tokens)
    return batches


def share_out(
    micro_batches: list[list[list[int]]], samples: Sequence[Sample], ranks: int, break_even: float
) -> list[list[list[list[int]] | None]]:
    """Micro-batches of each rank: as many for all, and those that ranks compute at the same time cost about as much.

    Where the number does not divide, the costliest are cut in two, as long as they have several rows; after that some
    ranks have nothing (None) in the last round. break_even: see ``Sharing``.
    """

    def cost(rows: list[list[int]]) -> float:
        widths = [_width([samples[index] for index in row]) for row in rows]
        return sum(width + width * width / break_even for width in widths)

    shared: list[list[list[int]]] = list(micro_batches)
    while len(shared) % ranks:
        divisible = [batch for batch in shared if len(batch) > 1]
        if not divisible:
            break
        costliest = max(divisible, key=cost)
        shared.remove(costliest)
        half = len(costliest) // 2
        shared += [costliest[:half], costliest[half:]]
    shared.sort(key=cost)
    rounds: list[list[list[list[int]] | None]] = []
    for start in range(0, len(shared), ranks):
        together: list[list[list[int]] | None] = [*shared[start : start + ranks]]
        together += [None] * (ranks - len(together))
        # By turns in both directions, so that no rank has the cheaper one of each round.
        rounds.append(together if len(rounds) % 2 == 0 else together[::-1])
    return [[together[rank] for together in rounds] for rank in range(ranks)]


def _form_rows(
    samples: Sequence[Sample], indices: Sequence[int], rollouts: int, max_tokens: int | None, break_even: float
) -> list[list[int]]:
    """Rollouts of one prompt join a row as long as that is cheaper than a row of their own."""
    rows: list[list[int]] = []
    open_rows: dict[bytes, tuple[list[int], int]] = {}  # by prompt: the row that may be joined, and its width
    for index in indices:
        sample = samples[index]
        prompt, added = _prompt(sample), _completion(sample) - 1
        row, width = open_rows.get(sample.prompt, ([], prompt))
        full = len(row) >= rollouts if max_tokens is None else width + added > max_tokens
        # What it costs, in units of the linear layers' work for one token, with row width w, prompt p, added tokens a
        # and break-even b: to join a + ((w + a)² - w²) / b, and a row of its own p + a + (p + a)² / b.
        dear = 2 * added * (width - prompt) > prompt * (prompt + break_even)
        if not row or full or dear:
            row, width = [], prompt
            rows.append(row)
        row.append(index)
        open_rows[sample.prompt] = row, width + added
    return rows


def _group_rows(
    samples: Sequence[Sample], rows: list[list[int]], rollouts: int, max_tokens: int | None
) -> list[list[list[int]]]:
    widths = [_width([samples[index] for index in row]) for row in rows]
    batches: list[list[list[int]]] = []
    current: list[list[int]] = []
    held = 0
    for width, row in sorted(zip(widths, rows, strict=True)):
        # In ascending order the newest is the widest, and its width is that of all.
        full = held + len(row) > rollouts if max_tokens is None else (len(current) + 1) * width > max_tokens
        if current and full:
            batches.append(current)
            current, held = [], 0
        current.append(row)
        held += len(row)
    if current:
        batches.append(current)
    return batches


def collate(rows: Sequence[Sequence[Sample]], device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch of padded rows. The rollouts of a row have one prompt."""
    width = max(map(_width, rows))
    shape = len(rows), width
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    part = np.full(shape, PADDING, dtype=np.int64)
    trained = Trained()
    for at, row in enumerate(rows):
        prompt = unpack_ints(row[0].prompt)
        start = end = len(prompt)
        ids[at, :start], positions[at, :start], part[at, :start] = prompt, np.arange(start), PROMPT
        for number, sample in enumerate(row, 1):
            completion = unpack_ints(sample.completion)
            begin, end = end, end + len(completion) - 1
            ids[at, begin:end], part[at, begin:end] = completion[:-1], number
            positions[at, begin:end] = np.arange(start, start + end - begin)
            # The hidden state of the token before predicts a token: of the first one, the prompt's last.
            places = np.arange(begin - 1, end)
            places[0] = start - 1
            trained.add(sample, completion, at * width + places)
    samples = [sample for row in rows for sample in row]
    layout = Rows(_tensor(part, torch.long, device), shared=len(samples) > len(rows))
    return trained.micro_batch(ids, positions, layout, samples, device)


@dataclass
class Trained:
    """The trained tokens of a micro-batch, as they are found rollout by rollout."""

    where: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)

    def add(self, sample: Sample, completion: np.ndarray, places: np.ndarray) -> None:
        """places: of the hidden states that predict the tokens of ``completion``."""
        mask = np.frombuffer(sample.mask, dtype=np.uint8) != 0 if sample.mask else slice(None)
        self.where.append(places[mask])
        self.targets.append(completion[mask])
        self.logprobs.append(unpack_floats(sample.logprobs)[mask])

    def micro_batch(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        layout: Rows | Flat,
        samples: Sequence[Sample],
        device: torch.device,
    ) -> MicroBatch:
        """ids, positions: [rows, width]. samples: in the order in which they were added."""
        counts = [len(found) for found in self.targets]
        return MicroBatch(
            input_ids=_tensor(ids, torch.long, device),
            positions=_tensor(positions, torch.long, device),
            layout=layout,
            where=_tensor(np.concatenate(self.where), torch.long, device),
            targets=_tensor(np.concatenate(self.targets), torch.long, device),
            rollout_logprobs=_tensor(np.concatenate(self.logprobs), torch.float32, device),
            sequence=_tensor(np.repeat(np.arange(len(samples)), counts), torch.long, device),
            advantages=_tensor(np.array([sample.advantage for sample in samples]), torch.float32, device),
        )


def _tensor(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)


def length_of(sample: Sample) -> int:
    """Tokens that a rollout has in a row of its own."""
    return _prompt(sample) + _completion(sample) - 1


def _width(row: Sequence[Sample]) -> int:
    return _prompt(row[0]) + sum(_completion(sample) - 1 for sample in row)


def _prompt(sample: Sample) -> int:
    return len(sample.prompt) // 4


def _completion(sample: Sample) -> int:
    return len(sample.completion) // 4
