"""The completion's mathematical answer is the solution's."""

import importlib.util
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cache, lru_cache
from typing import Any

from outrider.contract.errors import UserError

logger = logging.getLogger(__name__)

_NUMERAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


def accuracy(completions: list[str], *, solution: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where the completion is mathematically equal to the column `solution`, else 0.0.

    Of both, only what stands in the last `<answer>…</answer>` counts, where there is one. Two plain decimal
    numerals are compared exactly, as decimals ("4.0" is "4", "0.333" is not "0.3333"). Anything else is
    judged by math-verify, which finds the answer in running text, LaTeX included.

    None where there is no solution to compare with, or none that math-verify can read: scoring every
    completion 0 would train on a defect of the data. LaTeX in a solution needs its delimiters ($…$ or
    \boxed{…}). UserError without math-verify where it is needed.

    It sets no time limit of its own, because the signals that math-verify uses for that work in a main thread
    only: the caller has a deadline for every reward.
    """
    return [
        None if right is None else _score(_answer_of(completion), _answer_of(str(right)))
        for completion, right in zip(completions, solution, strict=True)
    ]


def require_math_verify() -> None:
    """UserError with the command that installs it, if math-verify is absent. Cheap: does not import it."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("the reward 'accuracy' needs math-verify, which is not installed: pip install 'outrider[math]'")


def _answer_of(text: str) -> str:
    # Found from the end, in linear time: a policy may repeat an unclosed tag to its length limit.
    head, closing, _ = text.rpartition("</answer>")
    _, opening, answer = head.rpartition("<answer>")
    return (answer if opening and closing else text).strip()


def _score(answer: str, solution: str) -> float | None:
    if _NUMERAL.fullmatch(solution) and _NUMERAL.fullmatch(answer):
        return float(Decimal(answer) == Decimal(solution))
    gold = _parse_solution(solution)
    if not gold:
        return None
    return float(_math_verify().verify(gold, _parse(answer), timeout_seconds=None))


# A group asks for the same solution G times; and it is worth one warning, not G.
@lru_cache(maxsize=4096)
def _parse_solution(solution: str) -> list[Any]:
    gold = _parse(solution)
    if not gold:
        logger.warning(
            "accuracy has no opinion where the solution is %r: math-verify finds no expression in it. "
            "LaTeX needs its delimiters: $…$ or \\boxed{…}",
            solution[:200],
        )
    return gold


def _parse(text: str) -> list[Any]:
    return _math_verify().parse(text, extraction_mode="first_match", parsing_timeout=None)


@cache
def _math_verify() -> Any:
    """The module, imported when first needed: it brings SymPy, which other rewards should not wait for."""
    require_math_verify()
    import math_verify

    # It warns that its own timeouts are off, which is on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
