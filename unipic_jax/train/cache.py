"""What frozen encoders make of a data set, kept with it: posteriors and, for Kontext, contexts.

The records are written anew at the sizes of the stage's buckets, and the files name the encoders
by a hash of their parameters; a stage with other encoders refuses them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree
from unipic_jax.data import buckets, feed, pipeline, records, shards
from unipic_jax.data.records import PICTURE_CACHES, TEXT_CACHES, BadRecord, Example, Record
from unipic_jax.models import autoencoder
from unipic_jax.train import objectives
from unipic_jax.train.collate import Collate
from unipic_jax.train.stage import Stage


def encoders(stage: Stage) -> tuple[str, ...]:
    """The frozen parts that make posteriors and contexts."""
    return tuple(n for n in stage.parts if n == "vae" or n.startswith("text_encoder"))


def digest(stage: Stage, frozen: Tree) -> str:
    """A hash of the encoders' parameters, as they are used. Raises InputError where one trains."""
    found = hashlib.sha256()
    for name in encoders(stage):
        if name in stage.trained:
            raise InputError(f"{name} trains in this stage, so what it makes cannot be kept")
        for path, leaf in sorted(traverse_util.flatten_dict(frozen[name]).items()):
            found.update("/".join((name, *path)).encode())
            found.update(np.ascontiguousarray(meshes.on_host(leaf)).view(np.uint8))
    return found.hexdigest()


def make_encode(config, stage: Stage) -> Callable[[Tree, dict], dict]:
    """A function (frozen parameters, batch) -> cached arrays by name, with a leading axis B."""
    dtype, vae = jnp.dtype(config.dtype), stage.parts["vae"].config

    @jax.jit
    def encode(params, batch):
        made = {}
        for name in ("target", "source"):
            if name in batch:
                posterior = autoencoder.encode(vae, params["vae"],
                                               objectives.to_unit(batch[name], dtype))
                made[f"{name}_moments"] = jnp.concatenate([posterior.mean, posterior.logvar], -1)
        if "conditioner" not in stage.parts:
            made |= objectives.conditions(stage.parts, params, batch["prompt"], dtype=dtype)
        return made

    return encode


def write(config, stage: Stage, frozen: Tree, source, sizes, target: Path, mesh, *,
          contexts: bool, progress: bool = True) -> int:
    """The examples of a source with their cached arrays as shards in the new folder `target`; how
    many. Bad records are left out."""
    encode, kept = make_encode(config, stage), PICTURE_CACHES + (TEXT_CACHES if contexts else ())

    def encoded(rows: list[Example]) -> Iterator[Record]:
        full = rows + rows[-1:] * (config.batch - len(rows))
        batch = feed.to_device(mesh, stage.collate[rows[0].task](full))
        made = {k: meshes.on_host(a) for k, a in encode(frozen, batch).items() if k in kept}
        for i, row in enumerate(rows):
            cached = {k: a[i].astype(ml_dtypes.bfloat16 if k in TEXT_CACHES else np.float16)
                      for k, a in made.items()}
            yield records.to_record(dataclasses.replace(row, cached=cached))

    def all_records() -> Iterator[Record]:
        waiting: dict[tuple, list[Example]] = {}
        places = buckets.nearest(source.sizes(), sizes)
        for i in tqdm(range(len(source)), unit=" records", disable=not progress):
            try:
                example = source[i]
            except BadRecord:
                continue
            if example.task not in stage.collate:
                continue
            rows = waiting.setdefault((example.task, places[i]), [])
            rows.append(pipeline.fit(example, sizes[places[i]]))
            if len(rows) == config.batch:
                yield from encoded(waiting.pop((example.task, places[i])))
        for rows in waiting.values():
            yield from encoded(rows)

    return shards.write(target, all_records(), encoder=digest(stage, frozen))


def reading(config, stage: Stage, frozen: Tree, sources, mesh) -> Mapping[str, Collate]:
    """The stage's collation, which takes cached arrays where the sources have them.

    Raises InputError where they were made by other encoders than the stage's.
    """
    made = {s.name: s.encoder for s in sources if getattr(s, "encoder", None)}
    if not made:
        return stage.collate
    mine = digest(stage, frozen)
    for name, encoder in made.items():
        if encoder != mine:
            raise InputError(f"{name} was encoded by other parameters than this stage's; make it "
                             "again with `unipic cache`")
    blank = {}
    if "conditioner" not in stage.parts:
        rows = [Example("", "", np.zeros((16, 16, 3), np.uint8))] * config.batch
        prompt = feed.to_device(mesh, feed.local_rows(
            mesh, stage.collate["generate"](rows)["prompt"], config.batch))
        encode = jax.jit(functools.partial(objectives.conditions, stage.parts,
                                           dtype=jnp.dtype(config.dtype)))
        blank = {k: meshes.on_host(a)[0].astype(ml_dtypes.bfloat16)
                 for k, a in encode(frozen, prompt).items()}
    return {task: _Reading(collate, blank) for task, collate in stage.collate.items()}


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A collation with cached arrays; captions that were dropped take the blank's."""

    collate: Collate
    blank: dict[str, np.ndarray]

    def __call__(self, examples):
        batch = self.collate(examples)
        for name in PICTURE_CACHES:
            if all(name in e.cached for e in examples):
                batch[name] = np.stack([e.cached[name] for e in examples])
        if self.blank and any("context" in e.cached for e in examples):
            batch["prompt"] = {k: np.stack([e.cached.get(k, self.blank[k]) for e in examples])
                               for k in TEXT_CACHES}
        return batch
