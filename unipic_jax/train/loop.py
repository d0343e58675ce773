"""A whole run of a stage: from a config and a folder to a trained model in it.

The folder holds config.json, `checkpoints/`, metrics.jsonl and TensorBoard's files, `samples/`
and, at the end, `model/`. The same call goes on where it was stopped.
"""

import contextlib
import functools
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.data import buckets, feed, pipeline, sources
from unipic_jax.data.records import TASKS, BadRecord, Example
from unipic_jax.train import cache, cost, evaluate, metrics, optimizer, output, stage, state, step
from unipic_jax.train import config as configs
from unipic_jax.train.checkpoint import Checkpoints, alone, stopping
from unipic_jax.train.goodput import Goodput

SCALE_BATCHES = 16  # to measure the scale of an autoencoder's latents on

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path, *, progress: bool = True) -> bool:
    """Run the stage to its end, or until SIGTERM; whether it came to the end.

    Raises InputError for a config that does not fit, data or weights that cannot be read, a full
    disk, where another run is in the folder, or where too many steps in a row were not finite.
    """
    if (workdir / "model").exists():
        log.info("%s holds the model already", workdir)
        return True
    mesh = open_mesh(config)
    with jax.set_mesh(mesh):
        return _train(config, workdir, mesh, progress)


def open_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of a config; InputError where it does not fit the devices or the batch."""
    try:
        mesh = meshes.make(**config.mesh)
    except ValueError as e:
        raise InputError(str(e)) from None
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.micro_batches != 1 and (
            config.micro_batches < 1 or config.batch % (config.micro_batches * devices)):
        raise InputError(f"a batch of {config.batch} does not divide into {config.micro_batches} "
                         f"micro-batches over {devices} devices")
    return mesh


def encode(config: ConfigDict, target: Path, *, contexts: bool, progress: bool = True) -> dict:
    """Write each source of the config with what the stage's frozen encoders make of it
    (`train.cache`), in a folder of its name in `target`; the counts. Raises as `train` does."""
    mesh = open_mesh(config)
    with jax.set_mesh(mesh):
        here = stage.open_stage(config)
        _, frozen = stage.parameters(config, here, mesh)
        data = Data(config, here, frozen, mesh)
        target.mkdir(parents=True, exist_ok=True)
        return {name: cache.write(config, here, frozen, source, data.sizes, target / name, mesh,
                                  contexts=contexts, progress=progress)
                for name, (source, _) in zip(config.data.sources, data.sources)}


def _train(config, workdir, mesh, progress) -> bool:
    here = stage.open_stage(config)
    trained, frozen = stage.parameters(config, here, mesh)
    data = Data(config, here, frozen, mesh)
    timing = optimizer.Config(**config.optimizer)
    update = optimizer.make(timing, config.steps)
    now = jax.jit(functools.partial(state.new, optimizer=update, ema=bool(config.ema)))(trained)
    del trained
    advance = jax.jit(step.make_step(
        here.loss, update, optimizer.schedule(timing, config.steps),
        micro_batches=config.micro_batches, ema=config.ema), donate_argnums=0)

    def cost_of(batch):
        return config.batch * cost.per_sample(config, here, batch)

    with alone(workdir):
        end = run(config, here, now, frozen, advance, data.batches, data, workdir, mesh,
                  progress=progress, cost_of=cost_of)
        if end is None:
            return False
        changes = {}
        if config.objective == "reconstruction":
            some = itertools.islice(data.batches(config.seed), SCALE_BATCHES)
            changes["vae"] = evaluate.latent_scale(
                here, here.combine(weights(end), frozen), feed.prefetch(mesh, some))
        output.write(config, here, weights(end), frozen, workdir / "model", changes)
    return True


def run(
    config: ConfigDict, here: stage.Stage, now: state.State, frozen: Tree, advance: Callable,
    batches: Callable, data: "Data", workdir: Path, mesh: jax.sharding.Mesh, *, progress: bool,
    cost_of: Callable[[dict], float] | None = None, versions: Callable[[], dict] = dict,
    useless: str = "were not finite; lower the learning rate, or look at the data",
    watch: Callable[[dict], None] | None = None,
) -> state.State | None:
    """Advance the state `now` to its end, or from the last checkpoint on; None where SIGTERM
    stopped it.

    `advance` is the jitted step (state, frozen, batch, key) -> (state, figures), and `batches` a
    function (seed, start=step) -> (task, this host's arrays) from a step on; `cost_of` tells the
    operations of a batch, `versions` what others serve, which checkpoints record, and `useless`
    what is wrong with steps that change nothing; `watch` is called with each line of figures.
    `data` is what evaluation takes its examples from. Raises InputError for a full disk, or where
    too many steps in a row changed nothing.
    """
    with Checkpoints(workdir / "checkpoints", **config.checkpoint) as checkpoints:
        first, goodput = 0, Goodput()
        if restored := checkpoints.restore(_abstract(now)):
            first, now, extra = restored
            log.info("goes on from step %d", first)
            goodput = Goodput(**extra.get("goodput", {}))
            _compare(extra["config"], config.to_json_best_effort())
            for name, now_is in versions().items():
                if (was := extra.get("versions", {}).get(name)) not in (None, now_is):
                    log.warning("%s is now of version %s and was of %s", name, now_is, was)
        if jax.process_index() == 0:
            configs.write(config, workdir / "config.json")
        key = jax.random.key(config.seed)
        coming = feed.prefetch(mesh, batches(config.seed, start=first))
        draw = evaluate.drawer(config, here, mesh) if config.objective == "velocity" else None
        costs = {}
        with (stopping() as stop_at,
              metrics.Writer(workdir, first, config.steps, config.batch, every=config.log_every,
                             flops=costs, progress=progress, watch=watch,
                             goodput=goodput) as writer):

            def report(step, now):
                with writer.paused():
                    evaluate.report(config, here, here.combine(weights(now), frozen), draw,
                                    data, writer, step)

            # At the end already, the run was stopped before its last scores were written.
            if first == config.steps or (config.samples.at_start and first == 0):
                report(first, now)
            for k in range(first, config.steps):
                task, batch = next(coming)
                if cost_of and task not in costs:  # buckets differ little
                    costs[task] = cost_of(batch)
                # The first step compiles. Each waits for the one before to end.
                with goodput.step() if k > first else contextlib.nullcontext():
                    now, figures = advance(now, frozen, batch, key)
                    last = writer.write(k + 1, figures, task)
                if last and last["skipped_in_row"] >= config.max_skipped:
                    raise InputError(f"{config.max_skipped} steps in a row before step {k} "
                                     f"{useless}")
                done, stop = k + 1 == config.steps, stop_at(k + 1)
                checkpoints.save(k + 1, now, {"goodput": goodput.kept,
                                              "config": config.to_json_best_effort(),
                                              "versions": versions()},
                                 force=done or stop)
                if stop and not done:
                    log.warning("stops at step %d; the same command goes on from there", k + 1)
                    return None
                if done or (k + 1) % config.samples.every == 0:
                    report(k + 1, now)
    return now


def _compare(before: str, now: str) -> None:
    """Say which fields of the config are not what they were."""
    a, b = (traverse_util.flatten_dict(json.loads(c), sep=".") for c in (before, now))
    if changed := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
        log.warning("the config has changed since: %s", ", ".join(changed))


def weights(now: state.State) -> Tree:
    """What is judged and written: the parameters' mean where there is one."""
    return now.params if now.ema is None else now.ema


def _abstract(tree):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


class Data:
    """The data of a stage: its sources, and the sizes of pictures that it is cut to."""

    def __init__(self, config, here: stage.Stage, frozen, mesh):
        self.config, self.here, self.mesh = config, here, mesh
        self.sources = [
            (sources.open_source({k: v for k, v in spec.items() if k != "weight"}),
             spec.get("weight", 1.0)) for spec in config.data.sources.values()]
        multiple = here.parts["vae"].config.factor if "vae" in here.parts else 1
        if "transformer" in here.parts:
            multiple *= here.parts["transformer"].config.patch_size
        self.sizes = buckets.sizes(config.data.pixels, multiple, config.data.ratios)
        self.collate = cache.reading(config, here, frozen, [s for s, _ in self.sources], mesh)

    def batches(self, seed: int, start: int = 0) -> pipeline.Batches:
        """This host's batches from step `start` on."""
        host, hosts = feed.share(self.mesh, self.config.batch)
        data = self.config.data
        return pipeline.batches(
            self.sources, self.collate, batch=self.config.batch, sizes=self.sizes, seed=seed,
            start=start, host=host, hosts=hosts, caption_dropout=data.caption_dropout,
            workers=data.workers)

    def tasks(self) -> list[str]:
        """The tasks of the stage that there are records for."""
        there = set().union(*(np.unique(source.tasks()) for source, _ in self.sources))
        return [t for i, t in enumerate(TASKS) if i in there and t in self.here.collate]

    def examples(self, task: str, count: int) -> list[Example]:
        """The first good ones of a task, all cut to one size."""
        found = []
        for source, _ in self.sources:
            for i in np.flatnonzero(source.tasks()[:count * 8] == TASKS.index(task)):
                with contextlib.suppress(BadRecord):
                    found.append(pipeline.fit(source[int(i)], self.sizes[0]))
                if len(found) == count:
                    return found
        return found
