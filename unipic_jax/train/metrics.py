"""Figures of a run while it goes: metrics.jsonl, TensorBoard, pictures and a progress display."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from unipic_jax.core import files, images
from unipic_jax.core.errors import InputError
from unipic_jax.train import flops as counts
from unipic_jax.train.goodput import Goodput

PLAIN_EVERY = 10.0  # seconds between lines where no display can be drawn

Values = dict[str, np.ndarray]


class Writer:
    """Writes what the steps report, in `folder`; only the first process does.

    `first` steps are done already, of `total`; what was written of later ones is dropped. A line
    every `every` steps holds the means since the line before: of figures, floats; integers are
    counts and stay as they are. `flops` are the operations of a step by task, for the share of the
    devices' peak. `watch` is called with each line, and `goodput` asked for each. Raises
    InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, first: int, total: int, batch: int, *, every: int,
                 flops: Mapping[str, float] = {}, progress: bool = True,
                 watch: Callable[[dict], None] | None = None,
                 goodput: Goodput | None = None):
        self.folder, self.total, self.batch, self.every = Path(folder), total, batch, every
        self.flops, self._watch, self._goodput = flops, watch, goodput
        self._writes = jax.process_index() == 0
        self._pending = None  # (step, what it reports, task), not read yet
        self._since: list[Values] = []  # the steps since the last line
        self._tasks: list[str] = []  # theirs, but of the first step, which is mostly compiling
        self._scores: dict[str, float] = {}
        self._mark = None  # when the first of them began
        self._board = self._bar = None
        self._printed = 0.0
        self._plain = False
        self._began = time.monotonic()
        if not self._writes:
            return
        path = self.folder / "metrics.jsonl"
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._began -= _keep_until(path, first)
            self._lines = path.open("a")
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first + 1,
                                        filename_suffix=f".{first}")
        except OSError as e:
            raise InputError(f"{folder} cannot be written: {e.strerror or e}") from e
        self._plain = progress and not sys.stderr.isatty()
        if progress and not self._plain:
            self._bar = tqdm(initial=first, total=total, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        self._take()
        if self._writes:
            self._lines.close()
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def write(self, step: int, report: Mapping[str, jax.Array], task: str) -> Values | None:
        """Take the report of the step that was just dispatched; returns that of the one before.

        Only the step before is waited for, so that the devices always have one to work on. Its
        losses are also written by task, "loss/edit"; "X_loss" of vectors is weighted by "X_count".
        """
        last = self._take()
        self._pending = step, report, task
        return last

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """More figures for the line of a step, as of an evaluation after it: shares by "task/name",
        which are also printed."""
        if self._bar is not None or self._plain:
            print(_scored(step, values), file=sys.stderr, flush=True)
        if self._pending is not None and self._pending[0] == step:
            self._scores |= values
        elif self._writes:
            self._line({"step": step} | values)

    def picture(self, step: int, picture: Image.Image, name: str) -> None:
        """Keep a picture as samples/000123-name.png and in TensorBoard."""
        if self._writes:
            images.save(picture, self.folder / "samples" / f"{step:06d}-{name}.png")
            self._board.add_image(f"samples/{name}", np.asarray(picture), step, dataformats="HWC")

    @contextlib.contextmanager
    def paused(self):
        """Time in here, as for an evaluation, does not count for images a second."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        began = time.monotonic()
        yield
        if self._mark is not None:
            self._mark += time.monotonic() - began

    def _take(self) -> Values | None:
        """Wait for the pending step and read it; write a line where it is time to."""
        if self._pending is None:
            return None
        (step, report, task), self._pending = self._pending, None
        report = jax.device_get(dict(report))
        if not self._writes:
            return report
        self._since.append(report | {f"loss/{task}": report["loss"]})
        if self._mark is None:
            self._mark = time.monotonic()
        else:
            self._tasks.append(task)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self.every == 0 or step == self.total or self._scores:
            self._line({"step": step} | _means(self._since) | self._speed() | self._scores)
            self._since, self._tasks, self._scores = [], [], {}
        return report

    def _speed(self) -> dict[str, float]:
        now = time.monotonic()
        taken, self._mark = now - self._mark, now
        if not self._tasks:
            return {}
        speed = {"images_per_second": len(self._tasks) * self.batch / taken}
        if self._goodput:
            speed["goodput"] = self._goodput.share
        if all(task in self.flops for task in self._tasks):
            done = sum(self.flops[task] for task in self._tasks) / taken
            speed["tflops_per_second"] = done / 1e12
            if (share := counts.mfu(done, jax.devices())) is not None:
                speed["mfu"] = share
        return speed

    def _line(self, values) -> None:
        step = values["step"]
        values |= {"seconds": round(time.monotonic() - self._began, 3)}
        plain = {name: _plain(value) for name, value in values.items()}
        try:
            self._lines.write(json.dumps(plain) + "\n")
            self._lines.flush()
        except OSError as e:
            raise InputError(f"{self._lines.name} cannot be written: {e.strerror or e}") from e
        for name, value in plain.items():
            for i, x in enumerate(value if isinstance(value, list) else [value]):
                if name != "step" and x is not None:
                    self._board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, x,
                                           step)
        if self._watch:
            self._watch(plain)
        said = _said(plain)
        if self._bar is not None:
            self._bar.set_postfix_str(said)
        elif self._plain and (time.monotonic() - self._printed > PLAIN_EVERY or step == self.total):
            self._printed = time.monotonic()
            print(f"step {step}/{self.total}  {said}", file=sys.stderr, flush=True)


def _keep_until(path: Path, step: int) -> float:
    """Drop the lines of later steps, and a last one that is cut; returns the seconds until then."""
    kept, seconds = [], 0.0
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= step:
            kept.append(line + "\n")
            seconds = values["seconds"]
    with files.new_file(path) as partial:
        partial.write_text("".join(kept))
    return seconds


def _means(reports: list[Values]) -> Values:
    """Means over the steps that have a figure and have it finite; the last of integers."""
    means = {}
    for name in dict.fromkeys(name for r in reports for name in r):
        rows = [r for r in reports if name in r]
        x = np.stack([r[name] for r in rows])
        weight = f"{name.removesuffix('_loss')}_count"
        if np.issubdtype(x.dtype, np.integer):
            means[name] = x[-1]
        elif not (name.endswith("_count") and f"{name.removesuffix('_count')}_loss" in rows[0]):
            w = np.stack([r[weight] for r in rows]) if weight in rows[0] else np.ones_like(x)
            w = np.where(np.isfinite(x), w, 0)
            with np.errstate(invalid="ignore"):
                means[name] = (w * np.nan_to_num(x)).sum(0) / w.sum(0)
    return means


def _plain(value):
    """A figure as JSON has it: None where it is not finite, a list for a vector."""
    value = np.asarray(value)
    if value.ndim:
        return [_plain(x) for x in value]
    return value.item() if np.isfinite(value) else None


def _scored(step: int, values: Mapping[str, float]) -> str:
    """Shares as a person reads them, a line a task."""
    tasks: dict[str, list[str]] = {}
    for name, value in values.items():
        task, _, kind = name.partition("/")
        tasks.setdefault(task, []).append(f"{kind} {value:.1%}")
    return "\n".join(f"\nafter {step} steps, {task}: {', '.join(shares)}"
                     for task, shares in tasks.items())


def _said(values) -> str:
    """The figures that a person looks at."""
    parts = []
    for name in ("reward", "loss"):
        if values.get(name) is not None:
            parts.append(f"{name} {values[name]:.4f}")
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.1f} images/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return "  ".join(parts)
