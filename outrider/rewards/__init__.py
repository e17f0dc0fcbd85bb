"""Reward functions: `(completions, **columns) -> list[float | None]`, plain or async; None is no opinion.

Columns are lists as long as completions: every dataset column by its name, plus `prompts` and
`completion_ids` (lists of token ids).
"""
