#!/usr/bin/env bash
# The whole recipe on the blocks world, from nothing to a unified model: every stage in its order.
# Stopped, it goes on where it was. Usage: launch/nano.sh DIR [--config.a.b=VALUE ...]
set -euo pipefail
out=${1:-runs/nano}
shift || true
mkdir -p "$out"

# A training step on a CPU makes hundreds of megabytes of temporaries; kept by the allocator, they
# are not faulted in anew at every step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=100000000}

train() { # STAGE [ARGUMENT ...]
    printf '\n== %s\n' "$1"
    unipic train --config "configs/nano/$1.py" --workdir "$out/$1" "${@:2}"
}

train autoencoder "$@"
train base "$@" --config.model="$out/autoencoder/model"
train kontext "$@" --config.model="$out/base/model"
train language "$@"
train align "$@" --config.model="$out/base/model" --config.mllm="$out/language/model"
train unified "$@" --config.model="$out/kontext/model" --config.mllm="$out/language/model" \
    --config.conditioner="$out/align/model/conditioner"

printf '\n== Kontext on held-out scenes\n'
unipic score --model "$out/kontext/model"
printf '\n== MetaQuery on held-out scenes\n'
unipic score --model "$out/unified/model" --mllm "$out/language/model"
unipic score --mllm "$out/language/model"
