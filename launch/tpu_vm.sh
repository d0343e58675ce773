#!/usr/bin/env bash
# A run on TPU VMs of a queued resource: bash launch/tpu_vm.sh [up | run | down]
# Without an argument: waits for the machines, brings the last commit to all hosts and runs it;
# when they are preempted it asks for others, and the run goes on from its checkpoint. The hosts
# need gcsfuse, by which the bucket is at /data.
set -euo pipefail
source "$(dirname "$0")/env.sh"
[ -n "$RUNTIME" ] || { echo "launch: $GENERATION has no TPU VMs; use jobset.sh" >&2; exit 2; }
[ "$SLICES" -eq 1 ] || { echo "launch: tpu_vm.sh runs one slice; use jobset.sh" >&2; exit 2; }
where=(--project="$PROJECT" --zone="$ZONE")
: "${POLL:=30}" # seconds between questions for the machines

queued() { gcloud compute tpus queued-resources "$1" "$NAME" "${where[@]}" "${@:2}"; }
state() { queued describe --format="value(state.state)" 2>/dev/null || true; }
down() { queued delete --force --quiet; }

up() {
    until [ "$(state)" = ACTIVE ]; do
        case $(state) in
            SUSPENDED | FAILED) down ;;
            "") queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
                    --runtime-version="$RUNTIME" --spot ;;
        esac
        sleep "$POLL"
    done
}

run() {
    local code
    code=$(mktemp --suffix=.tar.gz)
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$code" HEAD
    gcloud compute tpus tpu-vm scp "$code" "$NAME:code.tar.gz" "${where[@]}" --worker=all
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="set -e
        mkdir -p unipic_jax && tar xzf code.tar.gz -C unipic_jax && cd unipic_jax
        sudo mkdir -p /data && sudo chown \$USER /data
        mountpoint -q /data || gcsfuse --implicit-dirs $BUCKET /data
        python3 -m pip install --quiet uv && python3 -m uv venv --quiet --clear --python 3.12
        python3 -m uv pip install --quiet '.[tpu]'
        export PATH=\$PWD/.venv/bin:\$PATH NAME='$NAME' TOPOLOGY='$TOPOLOGY' WORKDIR='$WORKDIR'
        source launch/env.sh
        exec $COMMAND --distributed"
}

case ${1:-all} in
    up | run | down) "$1" ;;
    all)
        up
        until run; do
            echo "launch: the machines are gone, or the run failed; it goes on" >&2
            sleep "$POLL"
            up
        done
        ;;
    *) echo "launch: up, run or down" >&2; exit 2 ;;
esac
