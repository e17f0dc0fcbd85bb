"""Where the versions of vLLM that are supported differ, and where their parts that are no interface are touched.

Everything here is found by looking, not by comparing version numbers. What is needed and not there is found at the
start: the engines are prepared and warmed up within :func:`needed`, and asked for their progress as at a commit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outrider.contract.errors import UserError

#: Versions of vLLM that this was tried with.
TRIED = ("0.24.0", "0.32.0")


def tried_range() -> str:
    """In words."""
    return f"{TRIED[0]} to {TRIED[-1]}"


def is_tried(version: str) -> bool:
    """Whether ``version`` lies in the range of those that were tried."""
    numbers = [_numbers(each) for each in (TRIED[0], version, TRIED[-1])]
    return numbers[0] <= numbers[1] <= numbers[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())


class VllmVersionError(UserError):
    """The installed vLLM lacks what a server of this project needs."""

    def __init__(self, lacking: object) -> None:
        import vllm

        remedy = "install one of these"
        if is_tried(vllm.__version__):
            remedy = "this one too, so leave --engine_kwargs away, or give another --model or --engine torch"
        super().__init__(
            f"vLLM {vllm.__version__} cannot be used: {lacking}; {tried_range()} have been tried, {remedy}"
        )


@contextmanager
def needed() -> Iterator[None]:
    """Raises VllmVersionError where what is done within it finds vLLM to be another one than it was written for."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        raise VllmVersionError(f"{type(error).__name__}: {error}") from error


def engine_index(worker: Any) -> int:
    """Which of the data-parallel engines a worker belongs to. Engines of dense models do not know of each other any
    more: newer versions keep the index beside a rank that is always 0."""
    parallel = worker.vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", None)
    return int(parallel.data_parallel_rank if index is None else index)


def engines_and_ranks(config: Any) -> tuple[int, int]:
    """How many data-parallel engines a configuration is for, and how many workers each has. Seen from an engine of a
    dense model, there is one."""
    parallel = config.parallel_config
    return parallel.data_parallel_size, parallel.world_size


def check_steps(config: Any) -> None:
    """Raises UserError where a step may sample several tokens of a request: no worker can say how many it was."""
    for name in ("speculative_config", "diffusion_config"):
        if getattr(config, name, None) is not None:
            raise UserError(
                f"vLLM's {name} is set: with several tokens a step it cannot be said which weights sampled one"
            )


def sampled_tokens(model_runner: Any) -> dict[str, int]:
    """For each request that a worker runs, how many tokens it has sampled, those of the step in flight included.
    Requests of which that cannot be said without waiting for the GPU are left out.

    The first generation of model runners keeps the tokens, or placeholders for them, in its request states. The
    second one knows, on the CPU, how far a request was computed when it was last scheduled: one that was beyond its
    prompt then has been given one more token; one that was not may have got its first token, or is still prefilled.
    """
    states = getattr(model_runner, "req_states", None)
    if states is None:
        return {id: len(state.output_token_ids) for id, state in model_runner.requests.items()}
    progress = {}
    for id, row in states.req_id_to_index.items():
        computed = int(states.num_computed_tokens_np[row])
        if computed >= int(states.prefill_len.np[row]):
            progress[id] = computed - int(states.prompt_len.np[row]) + 2
    return progress


def external_id(internal_id: str) -> str:
    """The id under which a request was handed to the engine: vLLM appends a dash and eight characters."""
    return internal_id.rpartition("-")[0]


def stop_reading(client: Any) -> None:
    """Let vLLM's client await no more outputs: it takes engines that end, as they are told to, for engines that die."""
    handler = getattr(client, "output_handler", None)
    if handler is not None:
        handler.cancel()
