"""What ``--engine_kwargs`` hands through to vLLM, and what it must not. Imports neither torch nor vLLM."""

from typing import Any

import msgspec

from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig

#: Why a step samples one token of a sequence.
SEVERAL_TOKENS = "with several tokens a step it cannot be said which weights sampled one"

#: Engine arguments that cannot be given, with the reason.
_REFUSED: dict[tuple[str, ...], str] = {
    (
        "model", "host", "port", "tensor_parallel_size", "data_parallel_size", "api_key", "worker_extension_cls",
        "middleware", "logprobs_mode", "config",
    ): "this server depends on it",
    (
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size", "nnodes",
        "node_rank", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local",
        "data_parallel_hybrid_lb", "data_parallel_external_lb", "data_parallel_multi_port_external_lb",
        "enable_elastic_ep", "api_server_count", "headless",
    ): "every worker has to take new weights, and only those of --tensor_parallel_size and --data_parallel_size are "
       "known to this server",
    (
        "speculative_config", "spec_method", "spec_model", "spec_tokens", "diffusion_config",
    ): SEVERAL_TOKENS,
    ("logits_processors",): "tokens have to be drawn from the model's own distribution, which is what is trained",
}  # fmt: skip


def further_arguments(text: str) -> dict[str, Any]:
    """The arguments of a JSON object by name. Raises UserError where it is none, or has some that cannot be given."""
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(
            f"--engine_kwargs {text}: expected a JSON object, such as '{{\"swap_space\": 4}}': {error}"
        ) from error
    for name in given:
        if reason := _refusal(name):
            raise UserError(f"--engine_kwargs: {name} cannot be set there: {reason}")
    return given


def _refusal(name: str) -> str | None:
    """Why an engine argument is none that may be given. It may be spelled as vLLM's command line allows: with dashes,
    or as one field of an argument."""
    name = name.strip("-").replace("-", "_").partition(".")[0]
    for names, reason in _REFUSED.items():
        if name in names:
            return f"give --{name} itself" if name in RolloutConfig.__struct_fields__ else reason
    return None
