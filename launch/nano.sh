#!/usr/bin/env bash
# The whole recipe on the blocks world, from nothing to a unified model: every stage in its order.
# Stopped, it goes on where it was. Usage: launch/nano.sh DIR [--config.a.b=VALUE ...]
set -euo pipefail
out=${1:-runs/nano}
shift || true
mkdir -p "$out"

source "$(dirname "$0")/cpu.sh"

train() { # STAGE [ARGUMENT ...]
    printf '\n== %s\n' "$1"
    unipic train --config "configs/nano/$1.py" --workdir "$out/$1" "${@:2}"
}

# Pictures and language know nothing of each other yet, and small models run best on few cores: half
# of them draw, while on the others, in a log of its own, the language model learns to answer and then,
# with a model that draws, the queries to ask it.
half=$(($(nproc) / 2))
on() { # CORES COMMAND ...
    if [ "$half" -gt 0 ] && command -v taskset >/dev/null; then taskset -c "$1" "${@:2}"; else "${@:2}"; fi
}
words() {
    train language "$@"
    until [ -d "$out/base/model" ]; do sleep 5; done
    train align "$@" --config.model="$out/base/model" --config.mllm="$out/language/model"
}
pictures() {
    train autoencoder "$@"
    train base "$@" --config.model="$out/autoencoder/model"
    train kontext "$@" --config.model="$out/base/model"
}
export -f train words pictures
export out
set -m # a group of its own, to be stopped whole
on "0-$((half - 1))" bash -euc 'words "$@"' words "$@" >"$out/words.log" 2>&1 &
set +m
trap 'kill -- -$! 2>/dev/null || true' EXIT
printf '\n== language and align, in %s/words.log\n' "$out"
on "$half-$(($(nproc) - 1))" bash -euc 'pictures "$@"' pictures "$@"
wait $! || { tail -n 5 "$out/words.log" >&2; exit 1; }
trap - EXIT

train unified "$@" --config.model="$out/kontext/model" --config.mllm="$out/language/model" \
    --config.conditioner="$out/align/model/conditioner"

# The family in the released layout, and what it comes to.
release() { # MODEL NAME
    [ -d "$out/release/$2" ] || unipic export --from "$1" --to "$out/release/$2" --dtype bfloat16
}
release "$out/kontext/model" kontext
release "$out/unified/model" metaquery
release "$out/language/model" qwen2_5_vl

score() { # NAME ARGUMENT ...
    printf '\n== %s on held-out scenes\n' "$1"
    unipic score --json "$out/release/$1.json" "${@:2}"
}
score kontext --model "$out/release/kontext"
score metaquery --model "$out/release/metaquery" --mllm "$out/release/qwen2_5_vl"
score qwen2_5_vl --mllm "$out/release/qwen2_5_vl"
