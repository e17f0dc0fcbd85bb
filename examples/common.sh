# shellcheck shell=bash
# What all examples share. The server runs until the trainer has ended.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-1.7B}
DATASET=${DATASET:-problems.jsonl}
OUTPUT=${OUTPUT:-run}
# Words for the servers: a script's own arguments are the trainer's, but for --dry_run, which is for both.
ROLLOUT_FLAGS=${ROLLOUT_FLAGS:-}
DRY_RUN=
if [[ " $* " == *" --dry"[_-]"run"* ]]; then DRY_RUN=yes; fi

# rollout GPUS PORT FLAGS...: a server in the background. A dry run has to print before the trainer ends.
rollout() {
  local gpus=$1 port=$2
  shift 2
  # shellcheck disable=SC2086
  set -- outrider rollout --model "$MODEL" --engine vllm --host 127.0.0.1 --port "$port" "$@" $ROLLOUT_FLAGS
  if [[ $DRY_RUN ]]; then
    CUDA_VISIBLE_DEVICES=$gpus "$@" --dry_run
    echo
  else
    CUDA_VISIBLE_DEVICES=$gpus "$@" &
    SERVERS+=($!)
  fi
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
