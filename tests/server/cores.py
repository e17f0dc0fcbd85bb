"""An engine core in the test's own process, and what its requests gave."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from outrider.contract.arrays import pack_ints, unpack_floats, unpack_ints
from outrider.contract.generation import FinishReason, VersionSpan, append_version
from outrider.contract.sampling import SamplingParams
from outrider.server.torch_engine.core import EngineCore
from outrider.server.torch_engine.loading import load_model
from outrider.server.torch_engine.messages import ReplicaSpec, Stage, Submit, TensorPlace


@dataclass
class Choice:
    """One completion, put together from its deltas."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None
    deltas: int = 0

    @property
    def token_versions(self) -> list[int]:
        return [version for version, count in self.versions for _ in range(count)]


class Bench:
    """A core, the requests given to it, and their choices."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.model = model
        spec: dict[str, Any] = {
            "name": "test", "model": str(model), "dtype": "float32", "device": "cpu", "threads": 1,
            "max_model_len": 128, "max_num_seqs": 64, "max_num_batched_tokens": 256, "cache_positions": 64 * 128,
            "prefix_blocks": 0, "stop_tokens": (1,), **settings,
        }  # fmt: skip
        torch.set_num_threads(1)
        self.spec = ReplicaSpec(**spec)
        self.core = EngineCore(load_model(self.spec), self.spec)
        self.choices: dict[int, list[Choice]] = {}
        self.failures: dict[int, str] = {}
        self._files: list[Path] = []

    def ask(self, prompt: list[int], n: int = 1, seed: int = 0, stream: bool = False, **sampling: Any) -> int:
        """Queue a request; its number."""
        number = len(self.choices) + 1
        params = SamplingParams(**sampling)
        self.core.submit(
            Submit(request=number, prompt=pack_ints(prompt), sampling=params, n=n, seed=seed, stream=stream)
        )
        self.choices[number] = [Choice() for _ in range(n)]
        return number

    def steps(self, count: int | None = None) -> None:
        """Make ``count`` steps, or as many as there is work for."""
        while self.core.has_work and count != 0:
            self.core.step()
            self.take()
            count = None if count is None else count - 1

    def take(self) -> None:
        """Put together what the core has to tell."""
        for update in self.core.take_updates():
            if update.failure is not None:
                self.failures[update.request] = update.failure
            if (delta := update.delta) is None:
                continue
            choice = self.choices[update.request][delta.index]
            choice.tokens += unpack_ints(delta.token_ids).tolist()
            choice.logprobs += unpack_floats(delta.logprobs).tolist()
            choice.top_ids += unpack_ints(delta.top_ids).tolist()
            choice.top_logprobs += unpack_floats(delta.top_logprobs).tolist()
            for version, length in delta.versions:
                append_version(choice.versions, version, length)
            choice.reason = delta.finish_reason
            choice.deltas += 1

    def complete(self, prompt: list[int], **options: Any) -> list[Choice]:
        """One request, to its end."""
        number = self.ask(prompt, **options)
        self.steps()
        return self.choices[number]

    def stage(self, weights: dict[str, torch.Tensor], directory: Path) -> None:
        """Stage weights, by name, through a file."""
        path, places, offset = directory / f"weights-{len(self._files)}", [], 0
        with path.open("wb") as file:
            for name, tensor in weights.items():
                data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
                places.append(TensorPlace(name=name, shape=tuple(tensor.shape), offset=offset))
                offset += file.write(data)
        self._files.append(path)
        self.core.weights.stage(Stage(path=str(path), length=offset, places=places))


def reference(model: Path, seed: int | None = None) -> PreTrainedModel:
    """The model as Transformers runs it; with a seed, with other weights: those of a later version."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in loaded.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return loaded
