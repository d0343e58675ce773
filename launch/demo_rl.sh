#!/usr/bin/env bash
# Reinforcement in a few minutes: the shipped model draws, is scored, and learns from it.
# Usage: launch/demo_rl.sh DIR
set -euo pipefail
out=${1:-demo_rl}
rm -rf "$out" && mkdir -p "$out"
source "$(dirname "$0")/cpu.sh"

printf '\n== Groups of pictures in five steps, their scores, and an update after each\n'
unipic reinforce --config configs/nano/demo_rl.py --workdir "$out/run"

printf '\n== Done\n'
cat <<END
the reward, step by step        $out/run/reward.png
pictures before and after       $(ls "$out"/run/samples/*generate*.png | tr '\n' ' ')
the figures of every step       $out/run/metrics.jsonl
the model                       $out/run/model
Each step draws eight pictures of each of 16 captions, and makes those likelier that scored above
their group's mean; edits are held where they were. A whole recipe is launch/pdtr.sh.
END
