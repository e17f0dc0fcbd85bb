import pytest
import torch
from torch import Tensor

from outrider.trainer import logprobs
from outrider.trainer.logprobs import Head, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 13, 6, 31


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [tokens, hidden], weight [vocabulary, hidden], bias [vocabulary], all float64 with gradients, targets."""
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 100])
def test_values_gradients_and_entropies_are_those_of_all_logits_at_once(
    chunk: int, with_bias: bool, softcap: float | None, temperature: float
) -> None:
    hidden, weight, bias, targets = inputs()
    downstream = torch.randn(TOKENS, dtype=torch.float64)
    wanted_of = [hidden, weight] + [bias] * with_bias

    logits = hidden @ weight.T + (bias if with_bias else 0.0)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    distribution = torch.log_softmax(logits / temperature, dim=-1)
    expected = distribution[torch.arange(TOKENS), targets]
    wanted = torch.autograd.grad((expected * downstream).sum(), wanted_of, retain_graph=True)

    head = Head(weight, bias if with_bias else None, softcap)
    found, entropy = token_logprobs(hidden, targets, head, temperature, chunk, entropy=True)
    gradients = torch.autograd.grad((found * downstream).sum(), wanted_of)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, -(distribution.exp() * distribution).sum(-1).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=0, atol=1e-12)


def test_low_precision_logits_are_reduced_in_float32() -> None:
    hidden, weight, _, targets = (tensor.detach() for tensor in inputs())
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(TOKENS), targets]
    found, _ = token_logprobs(hidden.bfloat16(), targets, Head(weight.bfloat16(), None, None), 1.0, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_in_low_precision_are_those_in_high_but_for_rounding() -> None:
    hidden, weight, _, targets = inputs()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    for h, w in (low, exact):
        token_logprobs(h, targets, Head(w, None, None), 1.0, 4)[0].sum().backward()
    for rounded, reference in zip(low, exact, strict=True):
        assert rounded.grad is not None
        assert reference.grad is not None
        assert rounded.grad.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.grad.double(), reference.grad, rtol=0.02, atol=0.02)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each projection onto the vocabulary."""
    seen: list[int] = []
    project = logprobs._project

    def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(hidden))
        return project(hidden, weight, bias)

    monkeypatch.setattr(logprobs, "_project", watched)
    return seen


def test_no_projection_is_wider_than_a_chunk_forward_or_backward(projected: list[int]) -> None:
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden, targets, Head(weight, None, None), 1.0, 4)[0].sum().backward()
    # Four chunks, each made a second time for its gradient.
    assert projected == [4, 4, 4, 1] * 2


def test_a_single_chunk_and_what_needs_no_gradient_are_made_once(projected: list[int]) -> None:
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden, targets, Head(weight, None, None), 1.0, 13)[0].sum().backward()
    with torch.no_grad():
        token_logprobs(hidden, targets, Head(weight, None, None), 1.0, 4)
    assert projected == [13, 4, 4, 4, 1]


@pytest.mark.parametrize("chunk", [1, 8])
def test_no_tokens_still_have_a_gradient_to_run_backward(chunk: int) -> None:
    hidden, weight, _, _ = inputs()
    found, _ = token_logprobs(hidden[:0], torch.zeros(0, dtype=torch.int64), Head(weight, None, None), 1.0, chunk)
    found.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
