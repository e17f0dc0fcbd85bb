#!/usr/bin/env bash
# GPU 0 trains, GPU 1 generates with vLLM's own server, to which weights are sent by NCCL.
. "$(dirname "$0")/common.sh"
# shellcheck disable=SC2206
SERVER=(env CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve "$MODEL" --host 127.0.0.1 --port 8000
  --weight-transfer-config '{"backend":"nccl"}' --logprobs-mode processed_logprobs $ROLLOUT_FLAGS)
if [[ $DRY_RUN ]]; then # which vLLM's command does not have
  printf '%q ' "${SERVER[@]}"
  printf '\n\n'
else
  "${SERVER[@]}" &
  SERVERS+=($!)
fi
train 0 --weight_transport nccl --vllm_server_host 127.0.0.1 --vllm_server_port 8000 "$@"
