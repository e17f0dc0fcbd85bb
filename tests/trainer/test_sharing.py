from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from outrider.contract.arrays import unpack_ints
from outrider.contract.feed import Sample
from outrider.trainer.packing import collate
from outrider.trainer.sharing import PADDING, Sharing, find_sharing, shared_mask
from tests.server.models import save_model
from tests.trainer.build import make_policy, one_a_row, random_samples, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def pairs(samples: list[Sample]) -> list[list[Sample]]:
    return [samples[index : index + 2] for index in range(0, len(samples), 2)]


def short(samples: list[Sample], length: int) -> list[Sample]:
    """The same rollouts, none of which has more tokens than that."""
    cut = []
    for one in samples:
        prompt, completion = unpack_ints(one.prompt)[: length - 2], unpack_ints(one.completion)[:2]
        cut.append(sample(prompt, completion))
    return cut


def test_shared_rows_have_the_logprobs_and_gradients_of_rows_of_their_own(random_model: Path) -> None:
    policy = make_policy(random_model)
    assert policy.sharing is not None
    window = policy.sharing.window
    samples = random_samples(8, seed=31, masks=window is None)
    if window is not None:
        samples = short(samples, window)
    found = []
    for micro in (collate(pairs(samples), CPU), one_a_row(samples)):
        assert micro.layout.shared == (len(found) == 0)
        policy.model.zero_grad()
        logprobs = policy.logprobs(micro)
        (logprobs * torch.linspace(-1.0, 1.0, len(logprobs))).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
        found.append((logprobs.detach(), gradients))
    (shared, ours), (alone, expected) = found
    torch.testing.assert_close(shared, alone, rtol=0, atol=2e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=f"{name} differs")


def test_what_a_window_cuts_is_told(tmp_path: Path) -> None:
    sharing = make_policy(save_model("gemma2", tmp_path)).sharing
    assert sharing is not None
    assert sharing.window == 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_sees_its_prompt_and_its_own_completion(attention: str) -> None:
    rows = [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 3, PADDING, PADDING]]
    mask = shared_mask(torch.tensor(rows), attention)
    assert mask.shape == (2, 1, 8, 8)
    seen = mask if mask.dtype == torch.bool else mask == 0
    for row, part in enumerate(rows):
        for query, key in ((q, k) for q in range(8) for k in range(8)):
            if part[query] == PADDING:
                continue
            expected = key <= query and part[key] in (0, part[query])
            assert bool(seen[row, 0, query, key]) == expected, (row, query, key)
    # A place that sees nothing would be nan, and 0 x nan in the backward pass as well.
    assert seen.any(-1).all()


def uniform(ids: Tensor) -> Tensor:
    """Something like embeddings."""
    return torch.sin(ids[..., None].float() * torch.arange(1, 5))


def attends(ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Attention with equal weights, after the mask and the positions."""
    places = torch.arange(ids.shape[1])[None] if positions is None else positions
    seen = (mask if mask.dim() == 4 else torch.ones(*ids.shape, ids.shape[1]).tril()[:, None])[:, 0].float()
    return (seen @ (uniform(ids) + uniform(places))) / seen.sum(-1, keepdim=True)


def recurs(ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """A recurrence, which knows nothing of masks."""
    return uniform(ids).cumsum(1)


def counts(ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Attention that takes the places in the row for positions."""
    return attends(ids, mask, None)


def breaks(ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    return attends(ids, mask, positions) * torch.nan


@pytest.mark.parametrize(("hidden", "shares"), [(attends, True), (recurs, False), (counts, False), (breaks, False)])
def test_models_that_cannot_are_found_out(hidden: Callable[..., Tensor], shares: bool) -> None:
    config = LlamaConfig(vocab_size=99, hidden_size=64)
    found = find_sharing(config, "sdpa", hidden, CPU)
    assert found == (Sharing(96.0, None) if shares else None)


def test_an_attention_that_takes_no_such_mask(llama: Path) -> None:
    policy = make_policy(llama)
    assert find_sharing(policy.config, "flash_attention_2", policy._hidden, CPU) is None
    assert policy.sharing is not None
    assert make_policy(llama, attn_impl="eager").sharing == policy.sharing


def test_the_gradient_is_the_same_to_the_bit_on_several_threads(llama: Path) -> None:
    """So many rollouts in one row that the sum over its prompt's last place would be divided among threads."""
    policy = make_policy(llama)
    micro = collate([[sample([5, 6, 7], [8 + index % 80, 9]) for index in range(700)]], CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(3):
            policy.model.zero_grad()
            policy.logprobs(micro).sum().backward()
            gradients.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
