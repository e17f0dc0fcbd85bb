"""A penalty for saying the same thing again."""

from typing import Any


def repetition(
    completions: list[str], *, n_grams: int = 3, max_penalty: float = -1.0, **columns: Any
) -> list[float | None]:
    """(1 − unique / total n-grams) · max_penalty: 0 without repetition, near max_penalty with nothing else.

    From "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373). N-grams are of lower-cased
    words between white space, as in ms-swift, so that rewards stay comparable; a completion of fewer than
    n_grams words gets 0. Hence text written without spaces is hardly penalized: there is no fallback to
    characters, whose n-grams repeat in any ordinary text.
    """
    return [_penalty(completion.lower().split(), n_grams, max_penalty) for completion in completions]


def _penalty(words: list[str], n: int, max_penalty: float) -> float:
    total = len(words) - n + 1
    if total <= 0:
        return 0.0
    unique = len({tuple(words[start : start + n]) for start in range(total)})
    return (1.0 - unique / total) * max_penalty
