# The environment of a process on a TPU, and what follows from TOPOLOGY; sourced by the launchers
# and by what they start. Usage: source launch/env.sh [file of parameters]
source "${1:-$(dirname "${BASH_SOURCE[0]}")/job.env}"

GENERATION=${TOPOLOGY%%:*}
SHAPE=${TOPOLOGY##*:}
CHIPS=$((${SHAPE//x/*}))
CHIPS_PER_HOST=4
HOSTS=$((CHIPS / CHIPS_PER_HOST))
[ "$HOSTS" -ge 1 ] && [ $((HOSTS * CHIPS_PER_HOST)) -eq "$CHIPS" ] || {
    echo "launch: $TOPOLOGY has $CHIPS chips, not whole hosts of $CHIPS_PER_HOST" >&2
    exit 2
}

# ACCELERATOR: of TPU VMs and xpk; NODES: GKE's label; RUNTIME: the image of a TPU VM.
# FLAGS: the longest vector memory that fused operations may take, which the attention kernel and
# wide feed-forwards want; of v5p's flags those that offload collectives are known to hang.
case $GENERATION in
    v4)    ACCELERATOR=v4-$((2 * CHIPS))       NODES=tpu-v4-podslice      RUNTIME=tpu-ubuntu2204-base
           FLAGS= ;;
    v5e)   ACCELERATOR=v5litepod-$CHIPS        NODES=tpu-v5-lite-podslice RUNTIME=v2-alpha-tpuv5-lite
           FLAGS= ;;
    v5p)   ACCELERATOR=v5p-$((2 * CHIPS))      NODES=tpu-v5p-slice        RUNTIME=v2-alpha-tpuv5
           FLAGS=--xla_tpu_scoped_vmem_limit_kib=65536 ;;
    v6e)   ACCELERATOR=v6e-$CHIPS              NODES=tpu-v6e-slice        RUNTIME=v2-alpha-tpuv6e
           FLAGS=--xla_tpu_scoped_vmem_limit_kib=81920 ;;
    tpu7x) ACCELERATOR=tpu7x-$((2 * CHIPS))    NODES=tpu7x                RUNTIME=
           FLAGS=--xla_tpu_scoped_vmem_limit_kib=65536 ;;
    *) echo "launch: TOPOLOGY=$TOPOLOGY is of no known generation" >&2; exit 2 ;;
esac

export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-$FLAGS}"
# Programs compiled before a preemption are found again after it.
export JAX_COMPILATION_CACHE_DIR="$WORKDIR/compiled"
# The port that firewalls of clusters expect to be open; JAX's own default is another.
export JAX_COORDINATOR_PORT=8476
