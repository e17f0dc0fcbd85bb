"""What the built-in reward functions share: taking a column that they cannot do without."""

from collections.abc import Mapping, Sequence
from typing import Any

from outrider.contract.errors import UserError


def required_column(columns: Mapping[str, Any], name: str, *, reward: str) -> Sequence[Any]:
    """The column, one entry per completion; UserError, naming the columns there are, if it is not one."""
    if name not in columns:
        found = f"only {', '.join(sorted(columns))}" if columns else "no columns"
        raise UserError(
            f"the reward {reward!r} needs a dataset column {name!r}, and the data has {found}: "
            "rename or add a column, or choose another reward"
        )
    return columns[name]
