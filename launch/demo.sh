#!/usr/bin/env bash
# A tour: a small text-to-image model is trained to edit, goes to the released layout, and the copy
# there edits a picture. Usage: launch/demo.sh DIR
set -euo pipefail
out=${1:-demo}
rm -rf "$out" && mkdir -p "$out"
source "$(dirname "$0")/cpu.sh"
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*" && "$@"; }

step "A transformer that draws and cannot edit learns to; text encoders and autoencoder are frozen"
nano=$(dirname "$0")/../unipic_jax/nano
cp -r "$nano/kontext" "$out/base" && cp "$nano"/base/transformer/* "$out/base/transformer"
run unipic train --config configs/nano/demo.py --workdir "$out/run" --config.model="$out/base"

step "To the released layout"
run unipic export --from "$out/run/model" --to "$out/released" --dtype bfloat16

step "A picture from the shipped model, and an edit of it by the one that was just trained"
run unipic generate --model nano --prompt "a red square and a blue circle on a white background" \
    --height 48 --width 48 --steps 20 --guidance-scale 1.5 --output "$out/source.png"
run unipic edit --model "$out/released" --prompt "make the background black" \
    --image "$out/source.png" --image-size 48 --steps 20 --guidance-scale 1.5 \
    --output "$out/edited.png"

step "Done"
sheets=$(ls "$out"/run/samples/*.png | tail -2 | tr '\n' ' ')
cat <<END
prompts, sources and results    $sheets
the figures of every step       $out/run/metrics.jsonl, and TensorBoard's in $out/run
the model, released layout      $out/released
the picture and its edit        $out/source.png $out/edited.png
What 500 steps come to is above, by kind; the shipped model (--model nano) has had more of them.
END
