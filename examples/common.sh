# shellcheck shell=bash
# What all examples share. The server runs until the trainer has ended.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
DATASET=${DATASET:-problems.jsonl}
OUTPUT=${OUTPUT:-run}

# rollout GPUS PORT FLAGS...: a server in the background.
rollout() {
  local gpus=$1 port=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpus outrider rollout --model "$MODEL" --engine vllm --host 127.0.0.1 --port "$port" "$@" &
  SERVERS+=($!)
}

# train GPUS FLAGS...: the trainer, a process on each GPU, in the foreground. It waits for its servers.
train() {
  local gpus=$1
  shift
  CUDA_VISIBLE_DEVICES=$gpus outrider train --model "$MODEL" --dataset "$DATASET" \
    --reward_funcs accuracy --num_generations 8 --max_completion_length 2048 \
    --vllm_server_timeout 600 --max_staleness 2 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps "${ACCUMULATION:-64}" \
    --learning_rate 1e-6 --output_dir "$OUTPUT" "$@"
}

SERVERS=()
trap 'kill -TERM "${SERVERS[@]}" 2>/dev/null || true; wait' EXIT
