"""A trainer's side of a weight change, in the test's own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from outrider.contract.control import ServerInfo
from outrider.weights.publish import Publisher


@contextmanager
def publishing(
    model: Path, info: ServerInfo, run_id: str, segment_url: str | None = None, fingerprint: str | None = None
) -> Iterator[Publisher]:
    """A publisher of the weights in directory ``model``, in the dtype that the server serves."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {name: parameter.data for name, parameter in loaded.named_parameters()}
    publisher = Publisher(tensors, info.torch_dtype, run_id, fingerprint or info.model_fingerprint, segment_url)  # type: ignore[arg-type]
    try:
        yield publisher
    finally:
        publisher.close()
