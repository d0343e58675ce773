"""What each stage of the paper comes to on TPU pods: docs/pods.md, from `unipic plan`.

    python -m benchmarks.pods --dir docs/pods [--quick] [--only STAGE,PIXELS,GENERATION ...]
    python -m benchmarks.pods --dir docs/pods --table docs/pods.md

The first command compiles what is not in the folder yet, which takes minutes a plan on two cores,
and can be stopped and goes on; with --quick at XLA's least effort, sooner.
The second writes the table of what is there. The parts are those of the release, by their configs
alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import random_release

ROOT = Path(__file__).parents[1]
TOPOLOGIES = {"v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16"}
STAGES = ("kontext", "align", "unified", "pdtr_edit_512", "pdtr_t2i_512")
TASKS = {"align": "generate", "pdtr_t2i_512": "generate"}  # the others edit
QUICK = "-quick"  # at the end of a plan's name
GUIDED = "pdtr_edit_512_guided"  # with guidance while it samples and trains, on 64 chips
PLANS = [(stage, pixels, generation) for pixels in (512, 1024) for stage in STAGES
         for generation in TOPOLOGIES] + [(GUIDED, 512, "v5p"), (GUIDED, 512, "v6e")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE,PIXELS,GENERATION")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", type=Path, metavar="F.md")
    args = parser.parse_args()
    if args.table:
        args.table.write_text(table(args.dir), encoding="utf-8")
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    effort = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"} if args.quick else {}
    with tempfile.TemporaryDirectory() as folder:
        release = random_release.without_weights(Path(folder) / "release")
        for plan in PLANS:
            file = args.dir / f"{name(*plan)}{QUICK * args.quick}.json"
            if file.exists() or (args.only and name(*plan, ",") not in args.only):
                continue
            print(f"== {name(*plan)}", flush=True)
            done = subprocess.run(command(release, file, *plan), cwd=ROOT, stderr=subprocess.PIPE,
                                  text=True, env=os.environ | effort)
            if done.returncode:
                sys.exit(done.stderr)


def name(stage, pixels, generation, between="-"):
    return f"{stage}{between}{pixels}{between}{generation}"


def command(release: Path, file: Path, stage: str, pixels: int, generation: str) -> list[str]:
    """That of a plan."""
    fields, topology = {"model": release / "kontext"}, TOPOLOGIES[generation]
    if stage == GUIDED:
        stage = stage.removesuffix("_guided")
        fields |= {"rl.sampling.guidance_scale": 3.5}
        topology = {"v5p": topology, "v6e": "v6e:8x8"}[generation]
    if stage in ("align", "unified"):
        fields |= {"mllm": release / "metaquery/qwen2_5_vl",
                   "conditioner": release / "metaquery/conditioner"}
    if stage == "pdtr_edit_512":
        fields["judge"] = release / "edit_judge"
    return [sys.executable, "-m", "unipic_jax", "plan", "--config",
            f"configs/pods.py:{stage},{pixels},{generation}", "--topology", topology,
            "--task", TASKS.get(stage, "edit"), "--json", str(file),
            *(f"--config.{field}={value}" for field, value in fields.items())]


def table(folder: Path) -> str:
    """The plans in a folder as Markdown; quick ones only where there is no other."""
    lines, both = [HEAD], []
    for plan in PLANS:
        whole, quick = (read(folder / f"{name(*plan)}{end}.json") for end in ("", QUICK))
        if whole or quick:
            lines.append(row(*plan, whole or quick))
        if whole and quick:
            both.append(f"| {label(*plan)} | " + " | ".join(
                f"{of(quick) / of(whole) - 1:+.1%}" for of in COMPARED) + " |")
    return "\n".join([*lines, BOTH, *both] if both else lines) + "\n"


def read(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


COMPARED = (lambda p: p["peak"], lambda p: p["times"]["compute"], lambda p: p["times"]["memory"],
            lambda p: p["times"]["interconnect"], lambda p: p["images_per_second_per_chip"])


def label(stage, pixels, generation):
    return f"{stage.replace('_512', '').replace('_', ' ')} | {pixels} | {generation}"


def row(stage, pixels, generation, plan):
    start = f"| {label(stage, pixels, plan['topology'])} | {plan['batch']} | "
    memory = ""
    if "peak" in plan:
        memory = f"{plan['peak'] / 2**30:.1f} of {plan['capacity'] / 2**30:.0f}"
    if not plan["fits"]:
        return start + f"{memory} | does not fit: {plan['suggestion']} | | | | | | | |"
    times = plan["times"]
    return start + " | ".join([
        memory, *(f"{1e3 * times[kind]:.0f}" for kind in ("compute", "memory", "interconnect")),
        plan["bound"], f"{plan['images_per_second_per_chip']:.2f}", f"{plan['mfu']:.0%}",
        f"{plan['recomputed']:.0%}"]) + f" | {'quick' if plan.get('effort') else ''} |"


HEAD = """# Pods

The stages of the paper on TPU pods, by `unipic plan`: the real step of each, compiled for the
topology by the TPU's own compiler, and a roofline made of what that says. Nothing here was run on
a TPU. The table is written by

    python -m benchmarks.pods --dir docs/pods
    python -m benchmarks.pods --dir docs/pods --table docs/pods.md

with the configs of `configs/pods.py`, the shapes of the release and square pictures. A step takes
at least as long as the slowest of three things: the products of its matrices, at the chip's peak
but for what a matrix unit wastes on heads of 64; what is read from and written to memory; and what
crosses the interconnect, over all links of a chip at once. Memory is the peak of a device, in GiB;
times are in milliseconds; MFU counts no operation twice, and "again" is how many more are done, by
rematerialization and by padding. "Quick" plans were compiled at the least effort
(`JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1`), and may show more traffic of the memory than there would
be.

| stage | pixels | topology | batch | memory | compute | HBM | ICI | bound by | images/s/chip | \
MFU | again | |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

BOTH = """
What the least effort changes, where a plan was compiled at both:

| stage | pixels | | memory | compute | HBM | ICI | images/s/chip |
|---|---|---|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
