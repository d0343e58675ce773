#!/usr/bin/env bash
# A tour: a small model with random weights in the released layout, pictures from it, and the same
# model through the JAX layout and back. Usage: launch/demo.sh DIR
set -euo pipefail
out=${1:-demo}
rm -rf "$out" && mkdir -p "$out"
step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*" && "$@"; }

step "A model in the layout of UniPic2-SD3.5M-Kontext: every part, small, random weights"
run python -m benchmarks.random_release --size tiny --to "$out/released"

step "A picture from a prompt, and an edit of a picture"
run unipic generate --model "$out/released" --prompt "a red square left of a blue circle" \
    --height 128 --width 96 --steps 20 --output "$out/generated.png"
run unipic edit --model "$out/released" --prompt "make it green" --image tests/goldens/source.png \
    --image-size 128 --steps 20 --output "$out/edited.png"

step "To the JAX layout and back"
run unipic convert --from "$out/released" --to "$out/jax"
run unipic export --from "$out/jax" --to "$out/exported"
diff -r "$out/released" "$out/exported"

step "The same picture from the JAX layout"
run unipic generate --model "$out/jax" --prompt "a red square left of a blue circle" \
    --height 128 --width 96 --steps 20 --output "$out/again.png"
cmp "$out/generated.png" "$out/again.png"

step "Done"
cat <<END
generated and edited pictures   $out/generated.png $out/edited.png
the model, released layout      $out/released
the model, JAX layout           $out/jax
back in the released layout     $out/exported  (every file byte for byte the same)
The weights are random, so the pictures are patterns: the point is the path they took.
With the real weights: unipic generate --model hf://Skywork/UniPic2-SD3.5M-Kontext-2B --prompt ...
END
