"""The commands of `unipic` that train, and those that prepare and judge what is trained."""

import argparse
import os
from pathlib import Path

from unipic_jax.core.errors import InputError


def add(command) -> None:
    """Declare the commands by `command(name, run, text)`, which gives a parser."""
    for name, run, text in (
            ("train", train, "Train a stage"),
            ("reinforce", reinforce, "Reinforce a trained model by a reward (Flow-GRPO)")):
        sub = command(name, run, f"{text}; the same command goes on where it was stopped.")
        sub.add_argument("--config", required=True, metavar="F.py", help="the stage, a file of "
                         "configs/; --config.a.b=VALUE sets a field of it")
        sub.add_argument("--workdir", required=True, type=Path, metavar="DIR",
                         help="for checkpoints, metrics, samples and, at the end, model/")
        sub.add_argument("--distributed", action="store_true",
                         help="this is one of several processes: on TPU pods, Kubernetes and Slurm "
                         "JAX finds the others; elsewhere JAX_COORDINATOR_ADDRESS, "
                         "JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are")

    sub = command("score", _score, "Score a model on held-out scenes of the blocks world.")
    sub.add_argument("--model", metavar="DIR", default=argparse.SUPPRESS,
                     help="draw and edit with it (nano, a folder in either layout, hf://...)")
    sub.add_argument("--mllm", metavar="DIR", default=argparse.SUPPRESS,
                     help="draw by MetaQuery or, without --model, answer questions with it")
    sub.add_argument("--conditioner", metavar="DIR", default=argparse.SUPPRESS,
                     help="of MetaQuery, where it is not in the model's folder")
    sub.add_argument("--per-kind", type=int, default=64, help="scenes of each kind")
    sub.add_argument("--steps", type=int, default=20, help="denoising steps")
    sub.add_argument("--guidance-scale", type=float, default=1.5, help="off at 1 and below")
    sub.add_argument("--json", type=Path, metavar="F", default=argparse.SUPPRESS,
                     help="write the scores, and what they were measured with")

    sub = command("import", _import, "Data of others into shards for training.")
    _folders(sub)
    sub.add_argument("--kind", choices=("jsonl", "webdataset", "parquet"),
                     default=argparse.SUPPRESS, help="(default: what the folder holds)")
    sub.add_argument("--columns", nargs="+", default=(), metavar="FIELD=NAME", help="what the "
                     "fields target, source, text and answer are called there")

    sub = command("cache", cache, "Data with what a stage's frozen encoders make of it.")
    sub.add_argument("--config", required=True, metavar="F.py", help="the stage, whose sources "
                     "are encoded; --config.a.b=VALUE sets a field of it")
    sub.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR",
                     help="a folder of shards for each source")
    sub.add_argument("--contexts", action="store_true", help="the text encoders' contexts too, "
                     "megabytes a record at full size; else the autoencoder's posteriors alone")

    sub = command("blocks", _blocks, "Examples of the blocks world as files.")
    sub.add_argument("--task", choices=("generate", "edit", "describe"), required=True)
    sub.add_argument("--count", type=int, required=True)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR",
                     help="a new folder; it appears when all is written")
    sub.add_argument("--kind", choices=("shards", "tfds"), default="shards",
                     help="ArrayRecord shards, or a TFDS data set")

    sub = command("scored-edits", _scored_edits, "Edits of blocks by a model, with their scores: "
                  "what a judge of edits learns from.")
    sub.add_argument("--model", required=True, metavar="DIR", help="the model that edits")
    sub.add_argument("--count", type=int, required=True)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--held-out", action="store_true", help="of scenes that no training has seen")
    sub.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR",
                     help="a new folder of shards; it appears when all is written")


def _folders(sub):
    sub.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
    sub.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR",
                     help="a new folder; it appears when all is written")


def train(args):
    from unipic_jax.train import loop

    _run(args, loop.train)


def reinforce(args):
    from unipic_jax.rl import loop

    _run(args, loop.reinforce)


def _run(args, function):
    settings = _config(args)
    if args.distributed:
        _join()
    if function(settings, args.workdir):
        print(args.workdir / "model")


def cache(args):
    from unipic_jax.train import loop

    for name, count in loop.encode(_config(args), args.target, contexts=args.contexts).items():
        print(f"{args.target / name}: {count} records")


TAKE_FIELDS = (train, reinforce, cache)  # the commands whose config takes any --config.field=VALUE


def _config(args):
    import logging

    from unipic_jax.cli import keep_programs
    from unipic_jax.train import config

    logging.basicConfig(format="unipic: %(message)s", level=logging.WARNING)
    logging.getLogger("unipic_jax").setLevel(logging.INFO)
    keep_programs()
    return config.read([f"--config={args.config}", *args.rest])


def _join():
    """Meet the other processes of the run."""
    import logging

    import jax

    numbers = {}
    try:
        for name in ("num_processes", "process_id"):
            if value := os.environ.get(f"JAX_{name.upper()}"):
                numbers[name] = int(value)
        jax.distributed.initialize(**numbers)
        if jax.process_index():  # the first process speaks for all of them
            logging.getLogger("unipic_jax").setLevel(logging.ERROR)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--distributed: {str(e).splitlines()[0]}") from None


def _score(args):
    import json

    import jax

    from unipic_jax.cli import keep_programs
    from unipic_jax.core import files
    from unipic_jax.core import mesh as meshes
    from unipic_jax.train import evaluate, stage
    from unipic_jax.train.config import nano

    keep_programs()
    if target := getattr(args, "json", None):
        files.check_writable(target)
    model, mllm = getattr(args, "model", ""), getattr(args, "mllm", "")
    if not model and not mllm:
        raise InputError("give --model to draw and edit with, or --mllm to answer questions with")
    if args.per_kind < 1 or args.steps < 1:
        raise InputError("--per-kind and --steps must be at least 1")
    config = nano(generate=1.0)
    config.objective = "velocity" if model else "answer"
    config.model, config.mllm = model, mllm
    config.conditioner = getattr(args, "conditioner", "")
    config.samples.update({"steps": args.steps, "guidance_scale": args.guidance_scale})
    mesh = meshes.make(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        _, params = stage.parameters(config, here, mesh)
        scores = {}
        if model:
            draw = evaluate.drawer(config, here, mesh)
            for task in ("generate", "edit"):
                scores[task] = evaluate.drawn_scores(draw, params, task, args.per_kind)
                _print(task, scores[task])
        else:
            scores["describe"] = evaluate.answer_scores(here, params, args.per_kind)
            _print("describe", scores["describe"])
    if target:
        drawn = {"steps": args.steps, "guidance_scale": args.guidance_scale} if model else {}
        with files.new_file(target) as partial:
            partial.write_text(json.dumps(
                {"per_kind": args.per_kind} | drawn | {"scores": scores}, indent=1) + "\n")


def _print(task, scores):
    for name, share in scores.items():
        print(f"{task:9} {name:20} {share:7.1%}")


def _import(args):
    from unipic_jax.data import importers

    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    report = importers.import_folder(args.source, args.target, getattr(args, "kind", None), columns)
    _report(report, args.target)


def _blocks(args):
    from unipic_jax.data import importers, sources

    if args.count < 1:
        raise InputError("--count must be at least 1")
    source = sources.open_source({"kind": "blocks", "task": args.task, "seed": args.seed,
                                  "length": args.count})
    _report(importers.write_source(source, args.target, args.kind), args.target)


def _scored_edits(args):
    from unipic_jax.cli import keep_programs
    from unipic_jax.rl import scored

    if args.count < 1:
        raise InputError("--count must be at least 1")
    keep_programs()
    scored.write(args.model, args.count, args.target, seed=args.seed, held_out=args.held_out)
    print(args.target)


def _report(report, target):
    for line in report.first:
        print(f"skipped {line}")
    print(f"{target}: {report.written} records, {report.skipped} skipped")
