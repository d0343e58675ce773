"""The full-size proof: a part of the release through `unipic convert` and `unipic export`, and for
the transformer one denoising step against PyTorch.

    python -m benchmarks.full_size --dir /tmp/scratch --json full_size.json
    python -m benchmarks.full_size --dir /tmp/scratch --part qwen2_5_vl

The transformer takes 20 GB of disk, 16 GB of memory (for the step; conversion is held to 2 GB) and
ten minutes of two cores; Qwen2.5-VL-7B 55 GB of disk and less than 3 GB of memory. Ends with 1
where a limit is not met. Weights are random, at the released shapes.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Nothing large is imported here: Linux counts the memory of a process that starts another towards
# the peak of the started one.

PARTS = {  # tensors, parameters, and the limit in MB of convert's and export's memory
    "transformer": (909, 2_469_663_936, 2000),
    "text_encoder_3": (219, 4_762_310_656, 2000),
    "qwen2_5_vl": (729, 8_292_166_656, 3000),
}
ERROR = 1e-4  # limit of the velocity
PIECE = 2**24


def measured(*command: str) -> dict:
    """Run a Python module in its own process: its seconds, its peak memory in MB (`peak` counts
    mapped pages of files too, `own` is sampled and does not) and what it printed last, if JSON."""
    start, own = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                own = max(own, int(line.split()[1]))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    child.returncode = status  # it is waited for
    if status:
        sys.exit(f"full_size: {' '.join(command)} failed")
    last = (child.stdout.read().splitlines() or [""])[-1]
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss * 1.024e-3, "own_mb": own * 1.024e-3,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            **(json.loads(last) if last.startswith("{") else {})}


def flush(folder: Path) -> float:
    """Files to the disk and out of the page cache; the seconds it took."""
    start = time.perf_counter()
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - start


def copy_file(source: Path, target: Path) -> dict:
    """The disk's own speed: the file read and written in pieces, and flushed."""
    start, times = time.perf_counter(), os.times()
    with open(source, "rb", buffering=0) as a, open(target, "wb", buffering=0) as b:
        while piece := a.read(PIECE):
            b.write(piece)
        os.fsync(b.fileno())
    seconds, end = time.perf_counter() - start, os.times()
    flush(source.parent)
    target.unlink()
    return {"seconds": seconds, "cpu_seconds": sum(end[:2]) - sum(times[:2])}


def header(f) -> tuple[bytes, dict]:
    """The raw header of a safetensors file, and its tensors."""
    raw = f.read(int.from_bytes(f.read(8), "little"))
    return raw, {k: v for k, v in json.loads(raw).items() if k != "__metadata__"}


def compare(a: Path, b: Path) -> tuple[int, bool]:
    """Tensors that differ in type, shape or any bit; and whether the files are the same bytes."""
    with open(a, "rb") as f, open(b, "rb") as g:
        (raw, ours), (raw_b, theirs) = header(f), header(g)
        base, base_b = f.tell(), g.tell()
        off = len(ours.keys() ^ theirs.keys())
        for name in ours.keys() & theirs.keys():
            x, y = ours[name], theirs[name]
            (begin, end), (begin_b, _) = x["data_offsets"], y["data_offsets"]
            f.seek(base + begin)
            g.seek(base_b + begin_b)
            off += (x["dtype"], x["shape"]) != (y["dtype"], y["shape"]) or any(
                f.read(n) != g.read(n)
                for n in (min(PIECE, end - i) for i in range(begin, end, PIECE)))
    return off, not off and raw == raw_b and a.stat().st_size == b.stat().st_size


def inputs() -> dict:
    """One step of an edit at 512x512, channels first; the same arrays for both programs."""
    import numpy as np
    rng = np.random.default_rng(0)
    shapes = {"latents": (1, 16, 64, 64), "reference": (1, 16, 64, 64),
              "context": (1, 333, 4096), "pooled": (1, 2048)}
    arrays = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
    return arrays | {"timestep": np.array([707.278], np.float32)}


def step_torch(folder: Path, velocity: Path) -> None:
    """The velocity by PyTorch, written to a file."""
    import numpy as np
    import torch

    from benchmarks import reference

    start = time.perf_counter()
    model = reference.load(folder, torch.float32)
    loaded = time.perf_counter()
    x = {k: torch.from_numpy(v) for k, v in inputs().items()}
    with torch.inference_mode():
        v = model(x["latents"], x["context"], x["pooled"], x["timestep"],
                  ref_hidden_states=x["reference"]).sample.numpy()
    end = time.perf_counter()
    np.save(velocity, v)
    print(json.dumps({"load_s": loaded - start, "step_s": end - loaded,
                      "velocity_rms": float(np.sqrt((v**2).mean()))}))


def step_jax(folder: Path, velocity: Path) -> None:
    """The velocity by JAX; prints its relative L2 error against the one in the file."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unipic_jax.convert import load
    from unipic_jax.model import read_part
    from unipic_jax.models import mmdit

    start = time.perf_counter()
    part = read_part(folder)
    params = jax.block_until_ready(load.read(part, jnp.float32))
    loaded = time.perf_counter()
    x = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in inputs().items()}
    run = jax.jit(lambda params, x: mmdit.apply(part.config, params, **x)).lower(params, x)
    run = run.compile()
    compiled = time.perf_counter()
    v = np.moveaxis(np.asarray(run(params, x)), -1, 1)
    end = time.perf_counter()
    want = np.load(velocity).astype(np.float64)
    print(json.dumps({"load_s": loaded - start, "compile_s": compiled - loaded,
                      "step_s": end - compiled,
                      "error": float(np.linalg.norm(v - want) / np.linalg.norm(want)),
                      "largest_error": float(np.abs(v - want).max())}))


def prove(folder: Path, part: str) -> dict:
    """All figures, by step; what is written lies in `folder`."""
    release, ours, back = folder / "release", folder / "jax", folder / "back"
    steps = {"write": measured("benchmarks.random_release", "--size", "full", "--to", str(release),
                               "--parts", part)}
    flush(release)
    files = sorted((release / part).glob("*.safetensors"))
    counts, size = [0, 0], sum(f.stat().st_size for f in files)
    for file in files:
        with open(file, "rb") as f:
            tensors = header(f)[1].values()
        counts[0] += len(tensors)
        counts[1] += sum(math.prod(t["shape"]) for t in tensors)
    assert tuple(counts) == PARTS[part][:2], counts

    def speed(step, nbytes=size):
        steps[step]["mb_per_s"] = nbytes / 1e6 / steps[step]["seconds"]

    speed("write")
    for step, source, target in (("convert", release, ours), ("export", ours, back)):
        steps[f"copy before {step}"] = copy_file(files[0], folder / "copy")
        speed(f"copy before {step}", files[0].stat().st_size)
        steps[step] = measured("unipic_jax", step, "--from", str(source), "--to", str(target))
        steps[step]["flush_s"] = flush(target)
        steps[step]["seconds"] += steps[step]["flush_s"]
        speed(step)
        flush(source)
    stored = sum(p.stat().st_size for p in ours.rglob("*") if p.is_file())

    off, identical = map(sum, zip(*(compare(f, back / part / f.name) for f in files)))
    shutil.rmtree(ours)
    shutil.rmtree(back)
    if part == "transformer":
        for name in ("torch", "jax"):
            steps[f"step in {name}"] = measured(
                "benchmarks.full_size", "--dir", str(release / part), "--step", name)
    return {"part": part, "processors": os.cpu_count(), "load_average": os.getloadavg(),
            "files": len(files), "tensors": counts[0], "parameters": counts[1], "bytes": size,
            "bytes_jax": stored, "tensors_differing": off, "files_identical": identical,
            "steps": steps}


def report(figures: dict) -> bool:
    """Print the table and the limits; whether all are met."""
    steps = figures["steps"]
    row = "{:20}{:>10}{:>10}{:>10}{:>10}{:>10}".format
    print(row("", "seconds", "of CPU", "MB/s", "peak MB", "own MB"))
    for name, s in steps.items():
        print(row(name, *(f"{s[k]:.0f}" if k in s else ""
                          for k in ("seconds", "cpu_seconds", "mb_per_s", "peak_mb", "own_mb"))))
    for name in ("torch", "jax"):
        s = steps.get(f"step in {name}", {})
        parts = (f"{k[:-2]} {s[k]:.1f} s" for k in ("load_s", "compile_s", "step_s") if k in s)
        if s:
            print(f"{name}: {', '.join(parts)}")
    print(f"{figures['part']}: {figures['files']} files, {figures['tensors']} tensors, "
          f"{figures['parameters']:,} parameters, {figures['bytes']:,} bytes "
          f"({figures['bytes_jax']:,} in the JAX layout)\n"
          "MB/s of the released file with the data flushed, from a cold cache; `copy` is the disk "
          "itself.\nTimes on a shared machine are noisy: read them against the copies.")
    checks = [(f"peak memory of {n}, MB", steps[n]["peak_mb"], PARTS[figures["part"]][2])
              for n in ("convert", "export")]
    checks += [("tensors that differ after the round trip", figures["tensors_differing"], 0)]
    if "step in jax" in steps:
        checks += [("velocity against PyTorch, relative L2", steps["step in jax"]["error"], ERROR)]
    for name, figure, limit in checks:
        print(f"{'ok  ' if figure <= limit else 'FAIL'} {name}: {figure:.3g} (limit {limit:g})")
    print(f"     files byte for byte the same: {figures['files_identical']} of {figures['files']}")
    return all(figure <= limit for _, figure, limit in checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="SCRATCH",
                        help="a folder of its own is made in it, and removed at the end")
    parser.add_argument("--part", choices=PARTS, default="transformer")
    parser.add_argument("--keep", action="store_true", help="leave the released folder there")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures there too")
    parser.add_argument("--step", choices=("torch", "jax"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:  # in a process of its own, started by `prove`
        run = step_torch if args.step == "torch" else step_jax
        run(args.dir, args.dir.parent / "velocity.npy")
        return 0
    folder = args.dir / "full_size"
    if folder.exists():
        sys.exit(f"full_size: {folder} exists already; remove it")
    try:
        folder.mkdir(parents=True)
        figures = prove(folder, args.part)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if report(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
