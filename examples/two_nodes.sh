#!/usr/bin/env bash
# Two nodes train with eight GPUs each. The same on both, but for the number of the node:
#
#   SERVER_HOSTS="10.0.0.8 10.0.0.9" MASTER_ADDR=10.0.0.1 NODE_RANK=0 ./two_nodes.sh    # on 10.0.0.1
#   SERVER_HOSTS="10.0.0.8 10.0.0.9" MASTER_ADDR=10.0.0.1 NODE_RANK=1 ./two_nodes.sh    # on the other
#
# and server_node.sh on each of SERVER_HOSTS. All hosts have one OUTRIDER_API_KEY, and the nodes of the trainer one file
# system under OUTPUT.
read -ra HOSTS <<<"${SERVER_HOSTS:?the hosts that run server_node.sh}"
ACCUMULATION=4 # of each of sixteen processes
. "$(dirname "$0")/common.sh"
export NNODES=2 NODE_RANK NPROC_PER_NODE=${NPROC_PER_NODE:-8} MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
train 0,1,2,3,4,5,6,7 --vllm_server_host "${HOSTS[@]}" --vllm_server_port 8000 "$@"
