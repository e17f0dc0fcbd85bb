"""Configuration of ``outrider rollout``."""

from typing import Annotated, Literal

from msgspec import Meta

from outrider.contract.options import DTypeChoice, PositiveInt, Section, option

EngineChoice = Literal["auto", "torch", "vllm"]


class RolloutConfig(Section):
    """One rollout server."""

    model: Annotated[str, option("Model directory or hub id")]
    engine: Annotated[
        EngineChoice,
        option(
            "torch: the embedded engine; vllm: vLLM's server; auto: vllm where it is installed and a GPU is visible, "
            "else torch"
        ),
    ] = "auto"
    host: Annotated[str, option("Address to listen on")] = "0.0.0.0"
    port: Annotated[int, option("Port to listen on; a taken port is an error", ge=0, le=65535)] = 8000
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        option("Longest prompt plus completion in tokens (default: what the model was made for; torch: "
               "at most 4096)",
               aliases=("vllm_max_model_len",)),
    ] = None  # fmt: skip
    max_num_seqs: Annotated[
        int,
        option(
            "Sequences decoded at once, by all replicas together; further ones wait",
            aliases=("vllm_max_num_seqs",),
            ge=1,
        ),
    ] = 256  # fmt: skip
    max_num_batched_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None,
        option("Tokens of one engine step, decoded and prefilled together, of all replicas (default: 2048 with torch, "
               "vLLM's own with vllm)"),
    ] = None  # fmt: skip
    kv_cache_gib: Annotated[
        float,
        option(
            "Upper bound of the key-value caches on a CPU and of the torch engine's, all replicas together, GiB", gt=0
        ),
    ] = 4.0
    torch_dtype: Annotated[
        DTypeChoice,
        option(
            "Serving precision; auto: bfloat16 where there are matrix units for it (CUDA, CPUs with AMX), else float32",
            aliases=("dtype",),
        ),
    ] = "auto"
    tensor_parallel_size: Annotated[
        int,
        option(
            "GPUs, or CPU cores, that share one replica; the torch engine takes 1",
            aliases=("vllm_tensor_parallel_size",),
            ge=1,
        ),
    ] = 1
    data_parallel_size: Annotated[
        PositiveInt | None,
        option("Replicas behind the one port (default: torch, small models: one for each CPU core; else 1)",
               aliases=("vllm_data_parallel_size",)),
    ] = None  # fmt: skip
    enable_prefix_caching: Annotated[
        bool,
        option("Keep the keys and values of ended sequences for prompts that begin alike, as long as the weights stay",
               aliases=("vllm_enable_prefix_caching",)),
    ] = True  # fmt: skip
    api_key: Annotated[
        str | None, option("Key that clients must send (default: OUTRIDER_API_KEY, else a key kept for this user)")
    ] = None
    seed: Annotated[int, option("Seed of requests that bring none", ge=0)] = 0
    drain_timeout: Annotated[
        float, option("Seconds that running requests are given after SIGTERM before they are cut off", ge=0)
    ] = 30.0
    threads: Annotated[
        PositiveInt | None, option("CPU threads of all replicas together (default: every core this process may use)")
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        option("vllm: share of each GPU's memory for weights, staged weights and cache", gt=0, le=1,
               aliases=("vllm_gpu_memory_utilization",)),
    ] = 0.9  # fmt: skip
    weight_staging: Annotated[
        Literal["device", "host"],
        option("vllm: where the next weights wait for their commit: device, beside those in use, or host, in pinned "
               "memory, which makes room for cache and the commit slower"),
    ] = "device"  # fmt: skip
    engines_per_device: Annotated[
        PositiveInt | None,
        option("vllm: servers that share the devices, each with its own copy of the weights (default: 2 for models of "
               "up to 2.5 GiB on GPUs with room for both, without tensor parallelism, else 1)"),
    ] = None  # fmt: skip
    enforce_eager: Annotated[
        bool | None,
        option("vllm: no compilation and no CUDA graphs (default: on a CPU true, on GPUs false)",
               aliases=("vllm_enforce_eager",)),
    ] = None  # fmt: skip
    disable_custom_all_reduce: Annotated[
        bool, option("vllm: all-reduce by NCCL alone", aliases=("vllm_disable_custom_all_reduce",))
    ] = False
    engine_kwargs: Annotated[
        str, option("vllm: JSON object of further engine arguments by name, which win over those that follow from "
                    "other flags", aliases=("vllm_engine_kwargs",))
    ] = "{}"  # fmt: skip
    log_level: Annotated[Literal["debug", "info", "warning", "error"], option("What the server logs, and vLLM")] = (
        "info"
    )
    dry_run: Annotated[bool, option("Print the resolved configuration and exit")] = False
