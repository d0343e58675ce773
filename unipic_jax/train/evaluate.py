"""How good the model in training is: pictures to look at, and scores on the embedded world."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unipic_jax.conditioning import qwen_chat
from unipic_jax.core import images, sheets
from unipic_jax.core import mesh as meshes
from unipic_jax.core.params import Tree
from unipic_jax.data import blocks, feed, sources
from unipic_jax.data.records import Example
from unipic_jax.models import autoencoder
from unipic_jax.pipelines import describe
from unipic_jax.train import objectives
from unipic_jax.train.draw import make_draw
from unipic_jax.train.stage import Stage

SEED = 2**31 - 1  # of the noise that evaluation begins with, and of its examples
NEW_TOKENS = 40  # of an answer about blocks, at most


def report(config, stage: Stage, params: Tree, draw: "Draw | None", data, writer, step: int):
    """Draw examples of each task of the stage on a sheet, and score blocks where the config says.

    `data` is the stage's `Data`; `draw` is None for stages that draw nothing.
    """
    scores = {}
    for task in data.tasks() if draw else ():
        examples = data.examples(task, config.samples.count)
        if examples:
            writer.picture(step, _sheet(examples, draw(params, examples)), task)
        if config.samples.blocks:
            found = drawn_scores(draw, params, task, config.samples.blocks)
            scores |= {f"{task}/{name}": value for name, value in found.items()}
    if config.objective == "answer" and config.samples.blocks:
        found = answer_scores(stage, params, config.samples.blocks)
        scores |= {f"describe/{name}": value for name, value in found.items()}
    if config.objective == "judgement" and config.samples.judged:
        found = judge_scores(config, stage, params)
        scores |= {f"judge/{name}": value for name, value in found.items()}
    if scores:
        writer.scores(step, scores)


def _sheet(examples, drawn):
    rows, seen = [], examples[0].source is not None
    for example, picture in zip(examples, drawn):
        row = [Image.fromarray(example.source)] if seen else []
        rows.append([*row, Image.fromarray(example.target), images.to_picture(picture)])
    headings = ["source"] * seen + ["target", "drawn"]
    return sheets.contact_sheet(rows, [e.text for e in examples], headings)


Draw = Callable[[Tree, Sequence[Example]], np.ndarray]
"""(parameters by part, examples of one task and size) -> pictures float32 [N, H, W, 3]"""


def drawer(config, stage: Stage, mesh: jax.sharding.Mesh) -> Draw:
    """What draws examples in batches of the config's size, compiled once a task and size."""
    draw = jax.jit(make_draw(stage.parts, steps=config.samples.steps,
                             guidance_scale=config.samples.guidance_scale,
                             dtype=jnp.dtype(config.dtype)))
    guided = config.samples.guidance_scale > 1

    def run(params, examples):
        collate, pictures = stage.collate[examples[0].task], []
        for first in range(0, len(examples), config.batch):
            rows = list(examples[first:first + config.batch])
            rows += rows[-1:] * (config.batch - len(rows))
            blank = [dataclasses.replace(e, text="") for e in rows]
            batch = collate(rows) | {"row": np.arange(first, first + config.batch)}
            if guided:
                batch["negative"] = collate(blank)["prompt"]
            batch = feed.to_device(mesh, feed.local_rows(mesh, batch, config.batch))
            negative = batch.pop("negative", None)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(SEED), batch.pop("row"))
            pictures.append(meshes.on_host(draw(params, batch, negative, keys)))
        return np.concatenate(pictures)[:len(examples)]

    return run


def drawn_scores(draw: Draw, params: Tree, task: str, per_kind: int) -> dict[str, float]:
    """Shares of held-out blocks of each kind drawn or edited exactly, of all of them ("exact") and,
    for edits, of what was to stay as it was that did ("preserved"); and "quality", how clearly the
    cells are what they are read as: 1 as drawn by the world itself, 0 half-way to something else.
    The rewards know of it up to a half."""
    held = blocks.evaluation(task, per_kind, SEED)
    examples = [Example("", text, target, None if held.source is None else held.source[i])
                for i, (text, target) in enumerate(zip(held.text, held.target))]
    scene, margin = _detect(draw(params, examples))
    more = {"quality": float(jnp.clip(margin, 0, 1).mean())}
    if task == "generate":
        exact, _ = _generation_score(scene, held.goal)
    else:
        exact, preserved = _edit_score(scene, held.goal.target, held.goal.source)
        more["preserved"] = float(preserved.mean())
    return _by_kind(task, held.kind, np.asarray(exact)) | more


_detect = jax.jit(blocks.detect)
_generation_score, _edit_score = map(jax.jit, (blocks.generation_score, blocks.edit_score))


def answer_scores(stage: Stage, params: Tree, per_kind: int, batch: int = 64) -> dict[str, float]:
    """Shares of the questions of each kind about held-out blocks that are answered right, and of
    all of them ("exact"); greedy."""
    part = stage.parts["mllm"]
    chat, held = qwen_chat.open_chat(part.folder), blocks.evaluation("describe", per_kind, SEED)
    chats = [[{"role": "user", "content": [
        {"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": text}]}]
        for picture, text in zip(held.source, held.text)]
    said = []
    for first in range(0, len(chats), batch):
        rows = chats[first:first + batch]
        rows += rows[-1:] * (batch - len(rows))
        options = describe.Options(max_new_tokens=NEW_TOKENS)
        said += describe.describe(chat, part.config, params["mllm"], rows, options)
    right = blocks.answer_score([a.text for a in said[:len(chats)]], list(held.answer))
    return _by_kind("describe", held.kind, right)


def judge_scores(config, stage: Stage, params: Tree) -> dict[str, float]:
    """How a judge agrees with the scores of edits that it has not learned from: Spearman's rank
    correlation, and the mean absolute error."""
    source, size = sources.open_source({"kind": "shards", "path": config.samples.judged}), 64
    judge = jax.jit(functools.partial(objectives.judgement, stage.parts, keys=None,
                                      dtype=jnp.dtype(config.dtype), remat="none"))
    wanted, errors, given = [], [], []
    for first in range(0, len(source) - size + 1, size):
        batch = stage.collate["describe"]([source[first + i] for i in range(size)])
        _, more = judge(params, batch)
        wanted.append(batch["score"])
        errors.append(more["absolute"])
        given.append(more["score"])
    wanted, given = np.concatenate(wanted), np.concatenate(given)
    return {"spearman": spearman(wanted, given), "absolute": float(np.mean(errors))}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation of two arrays [n]; equal values share the mean of their ranks."""
    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def _by_kind(task, kind, exact):
    names = blocks.KINDS[task]
    return {"exact": float(exact.mean())} | {
        name: float(exact[kind == i].mean()) for i, name in enumerate(names)}


def latent_scale(stage: Stage, params: Tree, batches) -> dict[str, float]:
    """The shift and scale that bring the autoencoder's latents to mean 0 and deviation 1, as keys
    of its config, measured on batches."""
    cfg = stage.parts["vae"].config

    @jax.jit
    def moments(batch):
        x = batch["target"].astype(jnp.float32) / 127.5 - 1
        z = autoencoder.encode(cfg, params["vae"], x).mean
        return z.mean(), jnp.square(z).mean()

    each = np.array([jax.device_get(moments(batch)) for _, batch in batches])
    mean, square = each.mean(0)
    return {"shift_factor": float(mean), "scaling_factor": float((square - mean**2) ** -0.5)}
