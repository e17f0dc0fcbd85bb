import math

import pytest

from outrider.observe.records import StepRecord
from tests.observe.build import make_step

#: What must never break a display: not finite, huge, negative where that makes no sense, absent.
WEIRD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -1.0, 0.0]


@pytest.fixture(params=WEIRD, ids=str)
def weird_step(request: pytest.FixtureRequest) -> StepRecord:
    normal = make_step(3)
    floats = {name: request.param for name in normal.__struct_fields__ if isinstance(getattr(normal, name), float)}
    return make_step(3, **floats, rewards={"a": request.param, "b": 1.0}, completion_length_max=10**30)
