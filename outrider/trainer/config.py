"""Configuration of the trainer: model, batches, loss, optimizer, saving."""

from typing import Annotated, Literal

from msgspec import Meta

from outrider.contract.options import DTypeChoice, PositiveInt, Section, option

CorrectionMode = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class ModelConfig(Section):
    """The policy."""

    model: Annotated[str, option("Model directory or hub id", aliases=("model_name_or_path",))]
    torch_dtype: Annotated[
        DTypeChoice,
        option("Compute precision; auto: bfloat16 on CUDA, float32 on the CPU. Master weights are float32",
               aliases=("dtype",)),
    ] = "auto"  # fmt: skip
    gradient_checkpointing: Annotated[bool, option("Recompute activations in the backward pass")] = False
    attn_impl: Annotated[
        str | None,
        option(
            "Attention of the Transformers model; varlen: rollouts one after the other, without padding (default: "
            "varlen on CUDA where the model can, else sdpa)",
            aliases=("attn_implementation",),
        ),
    ] = None
    torch_compile: Annotated[
        bool | None, option("Compile the decoder blocks (default: on CUDA, where rollouts are not padded)")
    ] = None
    trust_remote_code: Annotated[bool, option("Run code that comes with the model")] = False
    fsdp_cpu_offload: Annotated[
        bool, option("Keep master weights, gradients and optimizer state in host memory, and take steps there")
    ] = False
    fsdp_reshard_after_forward: Annotated[
        bool | None,
        option(
            "Give up gathered weights after each pass; false: they stay over the micro-batches of a step, at whose end "
            "alone gradients are added up over ranks, and each GPU keeps 6 bytes of every parameter for that (default: "
            "false where this is at most a sixth of a GPU's memory, or there is one process)"
        ),
    ] = None
    shard_across_nodes: Annotated[
        bool,
        option("Shard the model over all nodes; false: each node shards a copy over its own processes (HSDP)"),
    ] = True
    tensor_parallel_size: Annotated[
        int, option("Processes of a node that compute each layer together, from the same micro-batches", ge=1)
    ] = 1


class BatchConfig(Section):
    """The arithmetic of a batch."""

    per_device_train_batch_size: Annotated[int, option("Rollouts of one micro-batch on one device", ge=1)] = 8
    gradient_accumulation_steps: Annotated[int, option("Micro-batches of one optimizer step", ge=1)] = 1
    generation_batch_size: Annotated[
        PositiveInt | None,
        option("Rollouts that are generated together (default: micro-batch x devices x steps_per_generation)"),
    ] = None
    steps_per_generation: Annotated[
        PositiveInt | None,
        option(
            "Micro-batches for which one batch of rollouts is generated; k times --gradient_accumulation_steps make k "
            "optimizer steps, each on a part of the batch (default: --gradient_accumulation_steps)"
        ),
    ] = None
    num_iterations: Annotated[
        int, option("Times that a batch is trained on, each time with the same optimizer steps", ge=1)
    ] = 1
    max_tokens_per_micro_batch: Annotated[
        PositiveInt | None, option("Token budget of a micro-batch, instead of a number of rollouts")
    ] = None
    max_steps: Annotated[int, option("Optimizer steps; -1: as --num_train_epochs says", ge=-1)] = -1
    num_train_epochs: Annotated[float, option("Passes over the prompts", gt=0)] = 1.0


class LossConfig(Section):
    """The objective."""

    rlhf_type: Annotated[Literal["grpo"], option("Accepted for ms-swift scripts")] = "grpo"
    loss_type: Annotated[Literal["grpo", "bnpo", "dr_grpo", "dapo"], option("Loss and its normalization")] = "grpo"
    epsilon: Annotated[float, option("Clip range of the ratio", ge=0)] = 0.2
    epsilon_high: Annotated[
        Annotated[float, Meta(ge=0)] | None, option("Upper clip range where it differs from --epsilon")
    ] = None
    delta: Annotated[
        Annotated[float, Meta(gt=1)] | None, option("Upper bound of the ratio where the advantage is negative")
    ] = None
    beta: Annotated[float, option("Weight of the KL divergence from the reference model; 0: no reference", ge=0)] = 0.04
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], option("Ratio of each token, or of the sequence (GSPO)")
    ] = "token"
    rollout_importance_sampling_mode: Annotated[
        CorrectionMode | None,
        option("Correction for what the sampler's policy was (default: token_truncate when K > 0, none when K = 0)"),
    ] = None
    rollout_importance_sampling_threshold: Annotated[float, option("Threshold of that correction", gt=0)] = 2.0
    log_entropy: Annotated[bool, option("Record the policy's mean entropy over the trained tokens")] = False
    logprob_chunk_size: Annotated[int, option("Tokens whose vocabulary projection is computed at once", ge=1)] = 2048


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, option("Peak learning rate", ge=0)] = 1e-6
    lr_scheduler_type: Annotated[Literal["cosine", "linear", "constant"], option("Schedule after warm-up")] = "cosine"
    warmup_ratio: Annotated[float, option("Share of the steps that warm up", ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, option("Decoupled weight decay of matrices", ge=0)] = 0.1
    adam_beta1: Annotated[float, option("AdamW beta1", ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, option("AdamW beta2", ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, option("AdamW epsilon", gt=0)] = 1e-8
    max_grad_norm: Annotated[float, option("Clip the gradient's norm; 0: never", ge=0)] = 1.0


class RunConfig(Section):
    """Where the run lives and what it keeps."""

    output_dir: Annotated[str, option("Directory of the run: checkpoints, ledger, metrics, report")] = "outrider-run"
    seed: Annotated[int, option("Seed of data order and sampling", ge=0)] = 42
    save_steps: Annotated[
        int, option("Save a checkpoint every so many steps, at the end of a batch; 0: only at the end", ge=0)
    ] = 100
    save_total_limit: Annotated[PositiveInt | None, option("Checkpoints kept (default: all)")] = None
    save_only_model: Annotated[bool, option("Checkpoints without optimizer state, which cannot be resumed")] = False
    ledger_keep_steps: Annotated[
        int,
        option(
            "Newest steps whose rollouts stay in the ledger; those of older steps go to Parquet files, once they are "
            "older than every checkpoint that is kept",
            ge=0,
        ),
    ] = 100
    resume_from_checkpoint: Annotated[
        str | None, option("auto: the newest whole checkpoint of --output_dir; or the path of one")
    ] = None
    threads: Annotated[PositiveInt | None, option("CPU threads of the trainer (default: every core it may use)")] = None
    heartbeat_timeout: Annotated[
        float, option("Seconds without an answer of another node's host after which the run ends, naming it", ge=5)
    ] = 45.0
    dry_run: Annotated[bool, option("Print the resolved configuration and the step arithmetic, and exit")] = False
