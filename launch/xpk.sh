#!/usr/bin/env bash
# A run on a cluster that xpk has made: bash launch/xpk.sh
# xpk starts it again after a preemption; the run goes on from its checkpoint.
set -euo pipefail
source "$(dirname "$0")/env.sh"
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
    --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts=50 \
    --env="LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" \
    --env="JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR" \
    --env="JAX_COORDINATOR_PORT=$JAX_COORDINATOR_PORT" \
    --command="$COMMAND --distributed"
