#!/usr/bin/env bash
# GPU 0 trains, GPUs 1 and 2 share one copy of the model: for models too large for one.
. "$(dirname "$0")/common.sh"
rollout 1,2 8000 --tensor_parallel_size 2
train 0 --vllm_server_host 127.0.0.1 --vllm_server_port 8000 "$@"
