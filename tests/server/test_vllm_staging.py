"""Values of staged weights are looked at without copies of them."""

import math

import pytest
import torch

from outrider.server.vllm_engine.staging import all_finite


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return [torch.randn(70, 30).to(kind) for kind in kinds] + [torch.empty(0), torch.tensor(3.0)]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 4])
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_that_is_not_finite_is_found(broken: float, which: int, place: int) -> None:
    weights = parameters()
    weights[which].view(-1)[place] = broken
    assert not all_finite(weights)


def test_the_greatest_numbers_are_finite() -> None:
    weights = parameters()
    weights[0][0, 0] = torch.finfo(torch.bfloat16).max
    weights[1][0, 0] = torch.finfo(torch.float16).min
    assert all_finite(weights)
    assert all_finite([])
