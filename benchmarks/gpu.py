"""The whole model against the PyTorch code on one GPU, in one run, and the table of it.

    python -m benchmarks.gpu --dir SCRATCH [--table docs/gpu.md] [--turns 3] [--cases ...]
    python -m benchmarks.gpu --dir SCRATCH --tiny          # a rehearsal, on any machine

Weights are random ones at the released shapes, written to SCRATCH (33 GB, once); computed in
bfloat16, what trains in float32. The two programs do the same work one after the other, each in a
process of its own, for both do not fit beside each other; times are medians after two calls that
are not counted. A case that is done is not done again: SCRATCH/gpu.json has them.

generate, edit: a picture of 512 or 1024 pixels a side, from the prompt on, in 50 guided steps.
train: a step of AdamW on eight edits at 512, latents and texts given. reinforce: Flow-GRPO's
rollout of a group of 16 at 512 in ten steps, and nine of them learned from with adapters of rank
32. describe: 128 tokens on a picture of 512. PyTorch is diffusers and transformers, as the public
code uses them; in training its blocks' gradients are checkpointed.
"""

import argparse
import json
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks import nets, random_release, speed_rl, speed_train
from benchmarks.speed import normal
from benchmarks.turns import alternate

PROMPT, QUESTION = "a red square left of a blue circle, by a window", "What is this?"


class Case(NamedTuple):
    """What a call does, and how much of it."""

    kind: str
    pixels: int = 512  # a side
    count: int = 1
    unit: str = "pictures/s"
    steps: int = 50  # of a picture
    net: nets.Net = nets.FULL  # that trains

    def tiny(self) -> "Case":
        return self._replace(pixels=self.pixels // 8, count=min(self.count, 16), steps=4,
                             net=nets.NANO)


CASES = {
    "generate 512": Case("generate"), "generate 1024": Case("generate", 1024),
    "edit 512": Case("edit"), "edit 1024": Case("edit", 1024),
    "train": Case("train", count=8, unit="samples/s"),
    "reinforce": Case("reinforce", count=16, unit="samples/s"),
    "describe": Case("describe", count=128, unit="tokens/s"),
}


def source(case: Case) -> Image.Image:
    """The picture of an edit or a question."""
    pixels = np.random.default_rng(0).integers(0, 256, (case.pixels, case.pixels, 3), np.uint8)
    return Image.fromarray(pixels)


def conversation(case: Case) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": source(case)},
                                         {"type": "text", "text": QUESTION}]}]


def jax_side(case: Case, folder: Path):
    """A function that does the case's work and returns the most memory it took, in bytes."""
    import jax

    work, device = jax_work(case, folder), jax.devices()[0]

    def run() -> int:
        work()
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    return run


def jax_work(case: Case, folder: Path):
    import jax.numpy as jnp

    from unipic_jax.conditioning import qwen_chat
    from unipic_jax.convert import load
    from unipic_jax.pipelines import describe, edit, generate

    if case.kind == "train":
        return speed_train.jax_side("edit", case.count, case.net)
    if case.kind == "reinforce":
        return speed_rl.jax_side("full", case.count, "whole", case.net)
    if case.kind == "describe":
        part = describe.open_model(folder / "qwen2_5_vl")
        chat, weights = qwen_chat.open_chat(part.folder), load.read(part, jnp.bfloat16)
        options = describe.Options(max_new_tokens=case.count, dtype=jnp.bfloat16)

        def answer():
            made, = describe.describe(chat, part.config, weights, [conversation(case)], options)
            assert len(made.tokens) == case.count, f"an end after {len(made.tokens)} tokens"
        return answer

    parts = generate.open_model(folder, keep=True)
    options = generate.Options(steps=case.steps, dtype=jnp.bfloat16, vae_dtype=jnp.bfloat16)
    if case.kind == "edit":
        return lambda: edit.edit(parts, [source(case)], [PROMPT], image_size=case.pixels,
                                 options=options)
    return lambda: generate.generate(parts, [PROMPT], height=case.pixels, width=case.pixels,
                                     options=options)


def torch_side(case: Case, folder: Path):
    """The same in PyTorch."""
    import torch

    work = torch_work(case, folder, "cuda" if torch.cuda.is_available() else "cpu")

    def run() -> int:
        work()
        if not torch.cuda.is_available():
            return 0
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    return run


def torch_work(case: Case, folder: Path, device: str):
    import torch

    from benchmarks import reference
    from unipic_jax.pipelines.edit import NEGATIVE_PROMPT

    if case.kind == "train":
        return speed_train.torch_side("edit", case.count, case.net)
    if case.kind == "reinforce":
        return speed_rl.torch_side("full", case.count, "whole", case.net)
    if case.kind == "describe":
        return torch_answer(case, folder / "qwen2_5_vl", device)
    draw = reference.pipeline(folder, torch.bfloat16, device)
    noise = normal(0, 1, 16, case.pixels // 8, case.pixels // 8)
    if case.kind == "edit":
        picture = np.asarray(source(case), np.float32) / 255
        return lambda: draw(PROMPT, noise, case.steps, picture, NEGATIVE_PROMPT)
    return lambda: draw(PROMPT, noise, case.steps)


def torch_answer(case: Case, folder: Path, device: str):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from unipic_jax.conditioning import qwen_chat, qwen_images
    from unipic_jax.pipelines import describe

    cfg, chat = describe.open_model(folder).config, qwen_chat.open_chat(folder)
    prompt = qwen_chat.read(chat, cfg, [conversation(case)])
    patches, grid = qwen_images.preprocess(chat.images, [source(case)])
    ids = torch.from_numpy(prompt.ids[prompt.mask][None].astype(np.int64)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == cfg.image_token_id).long(),
              "pixel_values": torch.from_numpy(patches).to(device, torch.bfloat16),
              "image_grid_thw": torch.from_numpy(grid).to(device)}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    model = model.to(device, torch.bfloat16).eval()
    return lambda: model.generate(**inputs, do_sample=False, max_new_tokens=case.count,
                                  min_new_tokens=case.count).tolist()


def compare(case: Case, folder: Path, turns: int) -> dict:
    """Both programs' rates by the median of their calls, and their peak memory in GiB."""
    row = {"unit": case.unit}
    for name, side in (("jax", jax_side), ("torch", torch_side)):
        peak, seconds = alternate({name: side}, (case, folder), turns)
        row |= {name: case.count / statistics.median(seconds[name]),
                f"{name}_seconds": seconds[name], f"{name}_gib": peak[name] / 2**30}
    return row | {"ratio": row["jax"] / row["torch"]}


def machine() -> str:
    """The GPU and the versions."""
    try:
        gpu = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "no GPU"
    return "; ".join((gpu, *(f"{name} {version(name)}" for name in (
        "jax", "torch", "diffusers", "transformers"))))


def table(found: dict) -> str:
    """The figures in Markdown."""
    lines = [f"On {found['machine']}.", "",
             "| | unit | JAX | PyTorch | JAX / PyTorch | JAX, GiB | PyTorch, GiB |",
             "|---|---|---|---|---|---|---|"]
    for name, row in found["cases"].items():
        lines.append(f"| {name} | {row['unit']} | {row['jax']:.3g} | {row['torch']:.3g} | "
                     f"{row['ratio']:.2f} | {row['jax_gib']:.1f} | {row['torch_gib']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="SCRATCH")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--table", type=Path, metavar="F", help="write the table there too")
    args = parser.parse_args()
    here = machine()
    if not args.tiny and here.startswith("no GPU"):
        parser.error("there is no GPU here (no nvidia-smi); --tiny rehearses without one")
    folder, file = args.dir / "release", args.dir / "gpu.json"
    found = json.loads(file.read_text()) if file.exists() else {"machine": here, "cases": {}}
    if found["machine"] != here:
        parser.error(f"{file} is of {found['machine']}; give another --dir")
    if not folder.exists():
        args.dir.mkdir(parents=True, exist_ok=True)
        random_release.write(folder, "tiny" if args.tiny else "full",
                             (*random_release.PARTS, "qwen2_5_vl"))
        random_release.reads(folder / "qwen2_5_vl")
    for name in args.cases:
        if name not in found["cases"]:
            print(f"{name} ...", flush=True)
            case = CASES[name].tiny() if args.tiny else CASES[name]
            found["cases"][name] = compare(case, folder, args.turns)
            file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found), end="")
    if args.table:
        args.table.write_text("# On a GPU\n\nThe whole model against the PyTorch code, by "
                              f"`python -m benchmarks.gpu`, which says how.\n\n{table(found)}")


if __name__ == "__main__":
    main()
