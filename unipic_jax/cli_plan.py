"""The command of `unipic` that plans: a stage's cost on machines that are not here."""

import argparse
import json
import logging
from pathlib import Path

from unipic_jax.core.errors import InputError


def add(command) -> None:
    """Declare the command by `command(name, run, text)`, which gives a parser."""
    sub = command("plan", plan, "Compile a stage's step for a TPU topology, or for N CPU devices, "
                  "and say what it costs there; no TPU is needed.")
    sub.add_argument("--config", required=True, metavar="F.py", help="the stage, a file of "
                     "configs/; --config.a.b=VALUE sets a field of it")
    sub.add_argument("--topology", required=True, metavar="NAME",
                     help="v5p:4x4x4 and the like, of v4, v5e, v5p, v6e and tpu7x; cpu:N; or "
                     "gpu:N, for which it is not compiled")
    sub.add_argument("--num-slices", type=int, default=1, help="of that topology, joined by the "
                     "data center's network")
    sub.add_argument("--program", choices=("train", "reinforce", "sample"),
                     default=argparse.SUPPRESS, help="(default: what the config is for)")
    sub.add_argument("--task", choices=("generate", "edit", "describe"),
                     default=argparse.SUPPRESS, help="(default: the costliest the stage has)")
    sub.add_argument("--batch", type=int, default=argparse.SUPPRESS,
                     help="samples a step, on all chips (default: the config's)")
    sub.add_argument("--json", type=Path, metavar="F", default=argparse.SUPPRESS,
                     help="write all figures")


def plan(args):
    from unipic_jax import plan as plans
    from unipic_jax.core import files
    from unipic_jax.train import config as configs

    plans.prepare(args.topology)

    if target := getattr(args, "json", None):
        files.check_writable(target)
    if args.num_slices < 1:
        raise InputError("--num-slices must be at least 1")
    config = configs.read([f"--config={args.config}", *args.rest])
    if hasattr(args, "batch"):
        config.batch = args.batch
    program = getattr(args, "program", "reinforce" if "rl" in config else "train")
    if program == "reinforce" and "rl" not in config:
        raise InputError(f"{args.config} does not reinforce; give --program train or sample")
    task = getattr(args, "task", None) or _task(config)
    logging.basicConfig(format="unipic: %(message)s", level=logging.WARNING)
    logging.getLogger("unipic_jax").setLevel(logging.INFO)
    report = plans.plan(config, args.topology, kind=program, task=task, slices=args.num_slices)
    for line in table(report):
        print(line)
    if target:
        with files.new_file(target) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _task(config):
    if config.objective in ("answer", "judgement"):
        return "describe"
    if "rl" in config:
        return "generate" if config.rl.task == "generate" else "edit"
    return "generate" if config.objective == "reconstruction" else "edit"


def table(report: dict) -> list[str]:
    """The lines of a report for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    rows = [("on", f"{slices}{report['topology']}, {report['chips']} chips in all ({mesh or 1})"),
            ("program", f"{report['program']}, {report['task']}, batch {report['batch']}, "
                        f"remat {report['remat']}"),
            ("parameters", f"{report['parameters'] / 1e9:.3g} billion, "
                           f"{report['trained'] / 1e9:.3g} of them train"),
            ("operations", f"{report['flops_per_sample'] / 1e12:.3g} TFLOP a sample, and "
                           f"{report['recomputed']:.0%} more that is computed again or padding")]
    if "memory" in report:
        each = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in report["memory"].items())
        of = f" of {report['capacity'] / 2**30:.0f}" if "capacity" in report else ""
        rows.append(("memory", f"{report['peak'] / 2**30:.2f}{of} GiB a device ({each})"))
        rows += [("moved", f"{m['kind']} over {m['group']}{' slices' * m['network']}: "
                           f"{m['count']:.0f} times, {m['size'] / 1e9:.3g} GB a device")
                 for m in report["collectives"]]
    if "times" in report:
        each = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in report["times"].items() if t)
        rows += [("step", f"{1e3 * report['seconds']:.1f} ms at best, bound by {report['bound']} "
                          f"({each})"),
                 ("speed", f"{report['images_per_second_per_chip']:.3g} images a second and chip, "
                           f"MFU {report['mfu']:.1%}")]
    if report.get("fits") is False:
        peak = f": {report['peak'] / 2**30:.1f} of {report['capacity'] / 2**30:.1f} GiB" if (
            "peak" in report) else ""
        rows += [("memory", f"does not fit{peak}"), ("try", report["suggestion"])]
    if "compile_seconds" in report:
        effort = f", at an effort of {report['effort']:g}" if report["effort"] else ""
        rows.append(("compiled in", f"{report['compile_seconds']:.0f} s{effort}"))
    if "left_out" in report:
        rows.append(("left out", report["left_out"]))
    return [f"{name:12} {text}" for name, text in rows]
