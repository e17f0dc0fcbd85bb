"""The completion is the solution, character for character."""

from collections.abc import Sequence
from typing import Any


def exact_match(completions: list[str], *, solution: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion equals str(solution), both without surrounding white space, else 0.0.

    solution: the dataset's column of that name; None where it is None.
    """
    return [
        None if right is None else float(completion.strip() == str(right).strip())
        for completion, right in zip(completions, solution, strict=True)
    ]
