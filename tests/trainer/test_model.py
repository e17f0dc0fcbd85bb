from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, GraniteConfig, LlamaConfig, PretrainedConfig

from outrider.contract.arrays import unpack_ints
from outrider.contract.errors import UserError
from tests.server.models import DEMO_MODEL, save_model
from tests.trainer.build import VOCABULARY, make_policy, one_a_row, random_samples

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1,
    "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def saved(config: PretrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(directory)
    return directory


@torch.no_grad()
def plain_logprobs(directory: Path, samples: list[Any], temperature: float) -> Tensor:
    """Of the trained tokens: one rollout at a time, unpadded, through the model's own forward and full logits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for sample in samples:
        prompt, completion = unpack_ints(sample.prompt), unpack_ints(sample.completion)
        ids = torch.tensor([[*prompt, *completion]], dtype=torch.int64)
        table = torch.log_softmax(model(input_ids=ids).logits[0] / temperature, dim=-1)
        mask = sample.mask or b"\x01" * len(completion)
        found += [
            table[len(prompt) + place - 1, token] for place, token in enumerate(completion.tolist()) if mask[place]
        ]
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward(random_model: Path, temperature: float) -> None:
    samples = random_samples(6, seed=1, masks=True)
    policy = make_policy(random_model, temperature, chunk=5)
    found = policy.logprobs(one_a_row(samples))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), plain_logprobs(random_model, samples, temperature), rtol=0, atol=2e-5)


def test_padding_changes_nothing(random_model: Path) -> None:
    samples = random_samples(6, seed=2)
    policy = make_policy(random_model)
    with torch.no_grad():
        together = policy.logprobs(one_a_row(samples))
        alone = torch.cat([policy.logprobs(one_a_row([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**TINY, logit_scale=0.0625),
        GraniteConfig(**TINY, logits_scaling=8.0),
    ],
    ids=["cohere", "granite"],
)
def test_models_that_scale_their_logits_are_refused(config: PretrainedConfig, tmp_path: Path) -> None:
    directory = saved(config, tmp_path / "model")
    with pytest.raises(UserError) as caught:
        make_policy(directory)
    assert f"--model {directory}: {type(config).__name__.removesuffix('Config')}ForCausalLM computes its logits" in str(
        caught.value
    )


def test_gradient_checkpointing_gives_the_same_gradient(llama: Path) -> None:
    micro = one_a_row(random_samples(4, seed=3))
    gradients = []
    for recompute in (False, True):
        policy = make_policy(llama, gradient_checkpointing=recompute)
        policy.logprobs(micro).sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_although_the_model_trains(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, attention_dropout=0.5)
    policy = make_policy(saved(config, tmp_path / "model"))
    micro = one_a_row(random_samples(4, seed=4))
    assert policy.model.training
    assert torch.equal(policy.logprobs(micro), policy.logprobs(micro))


def test_a_reference_has_no_gradients_and_computes_in_the_precision_asked_for(llama: Path) -> None:
    policy = make_policy(llama, trainable=False, torch_dtype="bfloat16")
    assert {(p.dtype, p.requires_grad) for p in policy.model.parameters()} == {(torch.bfloat16, False)}
    assert not policy.logprobs(one_a_row(random_samples(2, seed=5))).requires_grad


def test_master_weights_are_float32_whatever_the_precision(llama: Path) -> None:
    policy = make_policy(llama, torch_dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    samples = random_samples(4, seed=6)
    found = policy.logprobs(one_a_row(samples))
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.model.parameters())
    torch.testing.assert_close(found.detach(), plain_logprobs(llama, samples, 1.0), rtol=0, atol=0.5)


def test_tied_weights_are_published_once(tmp_path: Path) -> None:
    policy = make_policy(saved(LlamaConfig(**TINY, tie_word_embeddings=True), tmp_path / "model"))
    tensors = policy.published_tensors()
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_what_is_published_follows_the_optimizer(llama: Path) -> None:
    policy = make_policy(llama)
    tensors = policy.published_tensors()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(1.5)
    assert all((tensor == 1.5).all() for tensor in tensors.values())


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--model {tmp_path}: cannot be loaded"):
        make_policy(tmp_path)
