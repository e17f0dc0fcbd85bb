import pytest
import torch
from torch import Tensor

from outrider.trainer.logprobs import token_logprobs

TOKENS, HIDDEN, VOCABULARY = 13, 6, 31


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, hidden], weight [vocabulary, hidden], targets, the first two float64 with gradients."""
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,))


class Widening(Tensor):
    """float() of these logits stays float64, so that rounding does not hide a mistake."""

    def float(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 100])
def test_chunks_change_neither_values_nor_gradients(chunk: int, temperature: float) -> None:
    hidden, weight, targets = inputs()
    torch.manual_seed(4)
    downstream = torch.randn(TOKENS, dtype=torch.float64)

    logits = torch.tanh(hidden @ weight.T / 3.0) * 3.0 / temperature
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(TOKENS), targets]
    wanted = torch.autograd.grad((expected * downstream).sum(), (hidden, weight))

    def project(rows: Tensor) -> Tensor:
        return (torch.tanh(rows @ weight.T / 3.0) * 3.0).as_subclass(Widening)

    found = token_logprobs(hidden, targets, project, temperature, chunk)
    gradients = torch.autograd.grad((found * downstream).sum(), (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_low_precision_logits_are_reduced_in_float32() -> None:
    hidden, weight, targets = (tensor.detach() for tensor in inputs())
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(TOKENS), targets]
    found = token_logprobs(hidden.bfloat16(), targets, lambda rows: rows @ weight.bfloat16().T, 1.0, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_projection_is_wider_than_a_chunk_forward_or_backward() -> None:
    hidden, weight, targets = inputs()
    seen: list[int] = []

    def project(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows @ weight.T

    token_logprobs(hidden, targets, project, 1.0, 4).sum().backward()
    # Four chunks, each made a second time for its gradient.
    assert sorted(seen) == [1, 1, 4, 4, 4, 4, 4, 4]


def test_without_gradients_nothing_is_made_twice() -> None:
    hidden, weight, targets = inputs()
    seen: list[int] = []

    def project(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows @ weight.T

    with torch.no_grad():
        token_logprobs(hidden, targets, project, 1.0, 4)
    assert seen == [4, 4, 4, 1]


@pytest.mark.parametrize("chunk", [1, 8])
def test_no_tokens_still_have_a_gradient_to_run_backward(chunk: int) -> None:
    hidden, weight, _ = inputs()
    found = token_logprobs(hidden[:0], torch.zeros(0, dtype=torch.int64), lambda rows: rows @ weight.T, 1.0, chunk)
    found.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
