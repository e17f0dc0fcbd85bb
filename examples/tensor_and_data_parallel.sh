#!/usr/bin/env bash
# GPU 0 trains, GPUs 1 and 2 share one copy of the model, GPUs 3 and 4 another.
. "$(dirname "$0")/common.sh"
rollout 1,2,3,4 8000 --tensor_parallel_size 2 --data_parallel_size 2
train 0 --vllm_server_host 127.0.0.1 --vllm_server_port 8000 "$@"
