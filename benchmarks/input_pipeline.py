"""Examples a second that the input pipeline delivers by itself, with no training step.

    python -m benchmarks.input_pipeline [--workers 0 1 2] [--seconds 5]

blocks: scenes of 48x48 drawn on demand. jpeg: ArrayRecord shards of JPEG files, made here of
filtered noise, at 512 pixels (not scaled) and at 1024 by 768 (scaled to 592 by 448).
"""

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from unipic_jax.data import buckets, pipeline, shards
from unipic_jax.data.records import Record
from unipic_jax.data.sources import open_source

BATCH = 16
NANO, FULL = ((48, 48),), buckets.sizes(512 * 512, 16)


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A picture with detail at all scales, so that it compresses about as a photograph."""
    rng, out = np.random.default_rng(seed), io.BytesIO()
    picture = np.zeros((size[1], size[0], 3))
    for step in (4, 16, 64):
        small = rng.integers(0, 256, (size[1] // step, size[0] // step, 3), np.uint8)
        picture += np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)) / 3
    Image.fromarray(picture.astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


def collate(examples):
    return {name: np.stack([getattr(e, name) for e in examples]) for name in ("target", "source")
            if getattr(examples[0], name) is not None}


def speed(source, sizes, workers: int, seconds: float) -> tuple[float, float]:
    """Examples a second, and a second of this process's processor time."""
    stream = pipeline.batches([(source, 1.0)], {"generate": collate, "edit": collate},
                              batch=BATCH, sizes=sizes, seed=0, workers=workers)
    for _ in range(pipeline.AHEAD + workers + 1):  # what is made ahead while nobody waits
        next(stream)
    start, used, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        steps += 1
    elapsed, used = time.perf_counter() - start, time.process_time() - used
    stream.close()
    return BATCH * steps / elapsed, BATCH * steps / used


def cases(folder: Path):
    """Name, source, sizes and mean bytes a record."""
    for task in ("generate", "edit"):
        yield f"blocks, {task}", open_source(
            {"kind": "blocks", "task": task, "seed": 0, "length": 100_000}), NANO, 0
    for name, task, size in (("jpeg 512", "generate", (512, 512)), ("jpeg 512", "edit", (512, 512)),
                             ("jpeg 1024x768", "generate", (1024, 768))):
        files = [jpeg(size, seed) for seed in range(24)]
        found = [Record(str(i), "a caption", files[i % 24],
                        files[(i + 1) % 24] if task == "edit" else None) for i in range(240)]
        path = folder / f"{name}-{task}"
        shards.write(path, found)
        yield (f"{name}, {task}", open_source({"kind": "shards", "path": str(path)}), FULL,
               sum(map(len, files)) // len(files))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    print(f"batches of {BATCH}, {os.cpu_count()} cores, {pipeline.THREADS} threads a process; "
          "examples a second by number of worker processes")
    print(f"{'':24}{'KB a picture':>14}" + "".join(f"{w:>9}" for w in args.workers)
          + "   a second of one core")
    with tempfile.TemporaryDirectory() as folder:
        for name, source, sizes, size in cases(Path(folder)):
            found = {w: speed(source, sizes, w, args.seconds) for w in sorted({0, *args.workers})}
            row = "".join(f"{found[w][0]:9.0f}" for w in args.workers)
            print(f"{name:24}{size / 1000:14.0f}{row}{found[0][1]:23.0f}", flush=True)


if __name__ == "__main__":
    main()
