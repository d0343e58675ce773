#!/usr/bin/env bash
# A run by SkyPilot, which finds machines and starts again after a preemption:
# bash launch/sky.sh > job.yaml && sky jobs launch job.yaml
set -euo pipefail
source "$(dirname "$0")/env.sh"
cat <<YAML
name: $NAME
resources:
  infra: gcp/${ZONE%-*}/$ZONE
  accelerators: tpu-$ACCELERATOR
  accelerator_args:
    runtime_version: $RUNTIME
  use_spot: true
  job_recovery: FAILOVER
workdir: .
file_mounts:
  /data:
    source: gs://$BUCKET
    mode: MOUNT
envs:
  LIBTPU_INIT_ARGS: "$LIBTPU_INIT_ARGS"
  JAX_COMPILATION_CACHE_DIR: "$JAX_COMPILATION_CACHE_DIR"
  JAX_COORDINATOR_PORT: "$JAX_COORDINATOR_PORT"
setup: |
  python3 -m pip install --quiet uv && python3 -m uv venv --quiet --clear --python 3.12
  python3 -m uv pip install --quiet '.[tpu]'
run: |
  export PATH=\$PWD/.venv/bin:\$PATH
  $COMMAND --distributed
YAML
