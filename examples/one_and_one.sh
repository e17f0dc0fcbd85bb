#!/usr/bin/env bash
# GPU 0 trains, GPU 1 generates.
. "$(dirname "$0")/common.sh"
rollout 1 8000
train 0 --vllm_server_host 127.0.0.1 --vllm_server_port 8000 "$@"
