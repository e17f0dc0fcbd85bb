"""The completion is the solution, character for character."""

from typing import Any

from outrider.rewards.columns import required_column


def exact_match(completions: list[str], **columns: Any) -> list[float | None]:
    """1.0 where the completion equals str(solution), both without surrounding white space, else 0.0.

    Needs the column `solution` (UserError without it); None where the solution is None.
    """
    solutions = required_column(columns, "solution", reward="exact_match")
    return [
        None if solution is None else float(completion.strip() == str(solution).strip())
        for completion, solution in zip(completions, solutions, strict=True)
    ]
