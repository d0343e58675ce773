"""Edits as a model makes them, with what they are worth: what a judge of edits learns from."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from unipic_jax.core import mesh as meshes
from unipic_jax.data import blocks, records, shards
from unipic_jax.data.records import Example
from unipic_jax.rl.rewards import traceable
from unipic_jax.train import evaluate, stage
from unipic_jax.train.config import nano

STEPS = (3, 6, 12)  # of the sampler, batch after batch: edits that fail and such that succeed
BATCH = 64
REPLACED = 1 / 3  # of the edits, so that the judge also sees what a good model never makes

_score = jax.jit(traceable.edit)


def write(model: str, count: int, target: Path, *, seed: int = 0, held_out: bool = False,
          progress: bool = True) -> None:
    """Write `count` edits of blocks by a model as shards in a new folder: source, instruction,
    the edit as target, and its graded score (`traceable.edit`) as the answer.

    One in three shows the true target, the unchanged source or another edit's target instead.
    Raises InputError where the model cannot be opened or the folder cannot be written.
    """
    made = tqdm(_edits(model, count, seed, held_out), total=count, unit=" edits",
                disable=not progress)
    shards.write(target, (records.to_record(e) for e in made))


def _edits(model, count, seed, held_out) -> Iterator[Example]:
    mesh = meshes.make(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        draws = []
        for steps in STEPS:
            config = nano(edit=1.0)
            config.model, config.batch = model, BATCH
            config.samples.update({"steps": steps, "guidance_scale": 1.0})
            here = stage.open_stage(config)
            draws.append(evaluate.drawer(config, here, mesh))
        _, params = stage.parameters(config, here, mesh)
        rng = np.random.default_rng([seed, held_out])
        for number in itertools.count():
            samples = [blocks.edit(seed, number * BATCH + i, held_out=held_out)
                       for i in range(BATCH)]
            examples = [s.example for s in samples]
            drawn = draws[number % len(draws)](params, examples)
            pictures = np.round(drawn * 255).astype(np.uint8)
            for i, other in enumerate(rng.permutation(BATCH)):
                if rng.random() < REPLACED:
                    pictures[i] = (examples[i].target, examples[i].source,
                                   examples[other].target)[rng.integers(3)]
            goal = jax.tree.map(lambda *a: np.stack(a), *(s.goal for s in samples))
            scores = np.asarray(_score(pictures.astype(np.float32) / 255, goal))
            for example, picture, score in zip(examples, pictures, scores):
                if count == 0:
                    return
                count -= 1
                yield Example(example.name, example.text, picture, example.source, f"{score:.4f}")
