"""The completion shows its reasoning and then its answer, in tags."""

import re
from typing import Any

_OPENING, _CLOSING = "<think>", "</answer>"
_MIDDLE = re.compile(r"</think>\s*<answer>")


def format_reward(completions: list[str], **columns: Any) -> list[float | None]:
    r"""1.0 where the whole completion is `<think>…</think>\s*<answer>…</answer>`, else 0.0.

    The format reward of DeepSeek-R1 (arXiv 2501.12948). Nothing may stand before or after, white
    space included; `…` is any text, line breaks included.
    """
    return [float(_is_formatted(completion)) for completion in completions]


def _is_formatted(text: str) -> bool:
    # The same as one regular expression with two `.*?`, but linear: that one takes quadratic time on a policy
    # that repeats `</think><answer>` to its length limit, which is just what an untrained policy does.
    return (
        text.startswith(_OPENING)
        and text.endswith(_CLOSING)
        and _MIDDLE.search(text, len(_OPENING), len(text) - len(_CLOSING)) is not None
    )
