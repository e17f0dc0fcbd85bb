#!/usr/bin/env bash
# GPU 0 trains; two servers of their own on GPUs 1 and 2, which may as well be on other machines.
. "$(dirname "$0")/common.sh"
rollout 1 8000
rollout 2 8001
train 0 --vllm_server_host 127.0.0.1 127.0.0.1 --vllm_server_port 8000 8001 "$@"
