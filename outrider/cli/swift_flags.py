"""ms-swift's flags that ours lacks, each with the reason in one line.

``unused`` ones change nothing that this project can get wrong, and are reported. ``refused`` ones would give another
run than the one asked for. Values under ``same`` ask for what happens here in any case, and pass.
"""

from collections.abc import Mapping

import msgspec

from outrider.server.vllm_engine.further_arguments import SEVERAL_TOKENS


class SwiftFlag(msgspec.Struct, frozen=True):
    """What becomes of a flag."""

    reason: str
    refused: bool
    same: tuple[str, ...] = ()


def _unused(reason: str, same: tuple[str, ...] = ()) -> SwiftFlag:
    return SwiftFlag(reason, False, same)


def _refused(reason: str, same: tuple[str, ...] = ()) -> SwiftFlag:
    return SwiftFlag(reason, True, same)


_OFF = ("false", "0", "no", "none", "null")
_ON = ("true", "1", "yes")
_ONE = ("1", "1.0")
_ZERO = ("0", "0.0", "none", "null")
_NONE = ("none", "null", "")

_COLOCATED = "it is for an engine inside the trainer; servers have settings of their own"
_PIPELINE = "weights are shared out over --tensor_parallel_size GPUs, not over stages; set 1"
_MULTI_TURN = "rollouts have one turn in this version; leave it out"
_GYM = "environments are not in this version; score with --reward_funcs"
_LORA = "all weights are trained in this version, and there is no LoRA; leave it out"
_TRAIN_TYPE = "all weights are trained in this version; set full"
_ADAPTER = "adapters are not in this version; merge it into a model directory and give that as --model"
_LOADING = "prompts are read and tokenized as they are needed"
_EVALUATION = "held-out prompts run on the servers, every --eval_steps steps"
_COSINE = "it is for the reward 'cosine', which is not built in"
_REFERENCE = "the reference model stays what the policy was at the start; leave it out, or give --beta 0"
_REFERENCE_SYNC = "the reference model is never moved"
_REWARD_MODEL = "reward models are not in this version; call one from a function in --reward_funcs"
_SHARDING = "FSDP2 shards over all processes, as ZeRO-3 does; --fsdp_cpu_offload true offloads"

_SHARED: dict[str, SwiftFlag] = {
    "model_type": _unused("the architecture is read from the model's own configuration"),
    "template": _unused("prompts go through the chat template of the model's tokenizer"),
    "model_revision": _refused("revisions cannot be chosen; download it and give its directory as --model", _NONE),
    "adapters": _refused(_ADAPTER, _NONE),
    "multi_turn_scheduler": _refused(_MULTI_TURN, _NONE),
    "max_turns": _refused(_MULTI_TURN, ("1", *_NONE)),
    "use_gym_env": _refused(_GYM, _OFF),
    "gym_env": _refused(_GYM, _NONE),
    "agent_template": _refused("tools are not in this version; leave it out", _NONE),
    "response_prefix": _refused("completions begin right after the prompt; put it into the prompts", _NONE),
    "use_hf": _unused("names that are not directories are taken as ids of the Hugging Face hub", _ON),
    "use_chat_template": _refused("chat prompts always go through the chat template; give plain-text prompts", _ON),
}

#: Of ``swift rollout``.
ROLLOUT_FLAGS: Mapping[str, SwiftFlag] = _SHARED | {
    "vllm_pipeline_parallel_size": _refused(_PIPELINE, _ONE),
    "pipeline_parallel_size": _refused(_PIPELINE, _ONE),
    "vllm_enable_expert_parallel": _refused("mixtures of experts cannot take new weights while they run", _OFF),
    "vllm_speculative_config": _refused(f"{SEVERAL_TOKENS}; leave it out", _NONE),
    "vllm_use_async_engine": _unused("the server always takes requests as they come", _ON),
    "vllm_max_lora_rank": _unused("there are no adapters here"),
    "vllm_enable_lora": _refused(_ADAPTER, _OFF),
    "vllm_quantization": _refused("the server samples from the weights as they were trained; leave it out", _NONE),
    "vllm_limit_mm_per_prompt": _refused("prompts are text alone in this version; leave it out", ("{}", *_NONE)),
    "external_plugins": _unused(
        "a server runs no plugins; reward functions belong to the trainer's --external_plugins"
    ),
    "max_length": _unused("the trainer's --max_length bounds prompts, the server's --max_model_len the whole"),
    "system": _refused("the trainer writes the prompts; give --system there", _NONE),
    "enable_thinking": _refused("the trainer writes the prompts; give --enable_thinking there", _NONE),
}

#: Of ``swift rlhf --rlhf_type grpo``.
TRAIN_FLAGS: Mapping[str, SwiftFlag] = _SHARED | {
    # What is trained.
    "train_type": _refused(_TRAIN_TYPE, ("full",)),
    "tuner_type": _refused(_TRAIN_TYPE, ("full",)),
    "lora_rank": _refused(_LORA),
    "lora_alpha": _refused(_LORA),
    "lora_dropout": _refused(_LORA),
    "target_modules": _refused(_LORA),
    "freeze_parameters": _refused("all weights are trained in this version; leave it out", _NONE),
    "quant_method": _refused("weights are not quantized here; leave it out", _NONE),
    "quant_bits": _refused("weights are not quantized here; leave it out", _ZERO),
    # Sampling.
    "structured_outputs_regex": _refused("it would make the sampler another policy than the trainer's", _NONE),
    # Servers.
    "vllm_server_group_port": _unused("weights travel over the server's one port, or shared memory"),
    "enable_flattened_weight_sync": _unused("weights are published by shard, with one manifest an update"),
    "move_model_batches": _unused("weights are published tensor by tensor into shared memory, and nothing is gathered"),
    "vllm_server_pass_dataset": _refused(_MULTI_TURN, _OFF),
    "vllm_gpu_memory_utilization": _unused(_COLOCATED),
    "vllm_max_model_len": _unused(_COLOCATED),
    "vllm_max_num_seqs": _unused(_COLOCATED),
    "vllm_tensor_parallel_size": _unused(_COLOCATED),
    "vllm_enforce_eager": _unused(_COLOCATED),
    "vllm_enable_prefix_caching": _unused(_COLOCATED),
    "vllm_disable_custom_all_reduce": _unused(_COLOCATED),
    "sleep_level": _unused(_COLOCATED, ("0",)),
    "offload_model": _unused(_COLOCATED, _OFF),
    "offload_optimizer": _unused(_COLOCATED, _OFF),
    # Objective.
    "advantage_estimator": _refused("advantages are those of GRPO in this version", ("grpo",)),
    "kl_in_reward": _refused("the KL divergence is part of the loss in this version", _OFF),
    "off_policy_sequence_mask_delta": _refused("choose a --rollout_importance_sampling_mode instead", _NONE),
    "overlong_filter": _refused(
        "truncated rollouts are trained too; the reward 'soft_overlong' discourages them", _OFF
    ),
    "top_entropy_quantile": _refused("every token is trained in this version; set 1", _ONE),
    "ref_model": _refused(_REFERENCE, _NONE),
    "sync_ref_model": _refused(_REFERENCE, _OFF),
    "ref_model_sync_steps": _unused(_REFERENCE_SYNC),
    "ref_model_mixup_alpha": _unused(_REFERENCE_SYNC),
    "loss_scale": _refused("every token of a completion counts alike", ("default", "last_round")),
    # Rewards.
    "reward_model": _refused(_REWARD_MODEL, _NONE),
    "reward_model_plugin": _refused(_REWARD_MODEL, _NONE),
    "reward_model_type": _refused(_REWARD_MODEL, _NONE),
    "cosine_max_len": _unused(_COSINE),
    "cosine_min_len_value_wrong": _unused(_COSINE),
    "cosine_max_len_value_wrong": _unused(_COSINE),
    "cosine_min_len_value_correct": _unused(_COSINE),
    "cosine_max_len_value_correct": _unused(_COSINE),
    # Logging.
    "log_rollout_offpolicy_metrics": _unused("the gap to the sampler's log-probabilities is always recorded", _ON),
    "logging_first_step": _unused("the first step is logged with the others", _ON),
    "logging_dir": _unused("logs are in --output_dir"),
    "add_version": _unused("--output_dir itself is the directory of the run", _OFF),
    # Data.
    "truncation_strategy": _refused("prompts that are too long are rejected, and none is cut", ("delete",)),
    "lazy_tokenize": _unused(_LOADING),
    "load_from_cache_file": _unused(_LOADING),
    "dataset_num_proc": _unused(_LOADING),
    "dataloader_num_workers": _unused(_LOADING),
    "data_seed": _unused("--seed orders the data too"),
    # Evaluation and saving.
    "eval_strategy": _unused(_EVALUATION),
    "per_device_eval_batch_size": _unused(_EVALUATION),
    "save_strategy": _unused("checkpoints are saved every --save_steps steps", ("steps",)),
    # Execution.
    "deepspeed": _unused(_SHARDING, _NONE),
    "fsdp": _unused(_SHARDING, _NONE),
    "ds3_gather_for_generation": _unused("weights are published by shard, and none is gathered for generation"),
    "sequence_parallel_size": _unused("sequences are not split over devices in this version", _ONE),
    "ddp_timeout": _unused("every phase has a deadline of its own"),
    "ddp_find_unused_parameters": _unused("gradients are added up by FSDP2, and there is no DDP"),
    "padding_free": _unused("how sequences are packed or padded follows from the device"),
    "packing": _unused("how sequences are packed or padded follows from the device"),
    "use_liger_kernel": _unused("log-probabilities are computed in chunks of --logprob_chunk_size in any case", _OFF),
    "bf16": _unused("--torch_dtype says the precision"),
    "fp16": _refused("--torch_dtype float16 says the precision", _OFF),
    "optim": _refused("the optimizer is AdamW", ("adamw_torch", "adamw_torch_fused")),
    "warmup_steps": _refused("give the warm-up as --warmup_ratio", _ZERO),
}
