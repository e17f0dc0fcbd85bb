#!/usr/bin/env bash
# A host whose eight GPUs generate for trainers on other hosts, with a copy of the model on each.
set -euo pipefail
: "${OUTRIDER_API_KEY:?the key that the trainer has as well}"
exec outrider rollout --model "${MODEL:-Qwen/Qwen3-1.7B}" --engine vllm --host 0.0.0.0 --port 8000 \
  --data_parallel_size 8 "$@"
