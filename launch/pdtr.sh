#!/usr/bin/env bash
# Progressive dual-task reinforcement on the blocks world: first edits, then text to image.
# Stopped, it goes on where it was. Usage: launch/pdtr.sh MODEL DIR [--config.a.b=VALUE ...]
set -euo pipefail
model=${1:-nano} out=${2:-runs/pdtr}
shift $(($# < 2 ? $# : 2))
source "$(dirname "$0")/cpu.sh"

reinforce() { # STAGE MODEL [ARGUMENT ...]
    printf '\n== %s\n' "$1"
    unipic reinforce --config "configs/nano/rl_$1.py" --workdir "$out/$1" --config.model="$2" "${@:3}"
}
reinforce edit "$model" "$@"
reinforce generate "$out/edit/model" "$@"

printf '\n== before and after, on held-out scenes, in the five steps without guidance that were learned in\n'
for drawn in "$model" "$out/generate/model"; do
    unipic score --model "$drawn" --steps 5 --guidance-scale 1
done
