"""The report's tables 2 and 3 on the nano family: who sees the picture of an edit, and what trains.

    python -m benchmarks.ablations --nano DIR --dir RUNS [--steps 800] [--seeds 0 1 2] [--jobs 2]

DIR is what `launch/nano.sh DIR` has made. Every row of a table starts from the same parts and sees
the same number of pictures, with a seed of its own for what it draws; its scores are of held-out
scenes. Stopped, the same command goes on where it was. RUNS/results.json, RUNS/table2.md,
RUNS/table3.md and, with matplotlib, RUNS/ablations.png are made anew each time from the runs that
are done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from tqdm import tqdm

STAGES = "configs/nano"
FIGURES = {"generate/exact": "generation", "edit/exact": "edit", "edit/preserved": "preservation"}
BLOCKS = 32  # held-out scenes of each kind


def runs(nano: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    """The arguments of each row of each table."""
    base, kontext, align = (nano / n / "model" for n in ("base", "kontext", "align"))
    queries = (f"--config={STAGES}/unified.py", f"--config.mllm={nano / 'language/model'}",
               f"--config.conditioner={align / 'conditioner'}")

    def seen_by(*names):  # one name makes a tuple of one only with its comma
        return f"--config.source_to=({','.join(map(repr, names))},)"

    def trains(*names):
        return f"--config.trained=({','.join(map(repr, names))},)"

    from_base = (*queries, f"--config.model={base}")
    unified = (*queries, f"--config.model={kontext}")
    return {
        "table2": {  # all of them from the model that does not edit yet
            "Kontext, transformer": (f"--config={STAGES}/kontext.py", f"--config.model={base}",
                                     "--config.optimizer.learning_rate=0.0005"),
            "MetaQuery, language model": (*from_base, seen_by("mllm")),
            "MetaQuery, transformer": (*from_base, seen_by("transformer")),
            "MetaQuery, both": (*from_base, seen_by("mllm", "transformer"))},
        "table3": {
            "connector frozen, transformer tuned": (*unified, trains("transformer")),
            "connector tuned, transformer frozen": (*unified, trains("conditioner")),
            "both tuned": (*unified, trains("conditioner", "transformer"))}}


def train(workdir: Path, arguments: tuple[str, ...], steps: int, seed: int, cores: Queue) -> None:
    """One run, to its end, on a set of cores that no other run has; CalledProcessError where it
    fails, with what it said in a log."""
    if (workdir / "model").exists():
        return
    command = [sys.executable, "-m", "unipic_jax", "train", "--workdir", str(workdir), *arguments,
               f"--config.seed={seed}", f"--config.steps={steps}", "--config.samples.every=1000000",
               f"--config.samples.blocks={BLOCKS}", "--config.checkpoint.keep=1"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    mine = cores.get()
    try:
        with workdir.with_suffix(".log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT,
                           preexec_fn=lambda: os.sched_setaffinity(0, mine))
    finally:
        cores.put(mine)


def scores(workdir: Path) -> dict[str, float]:
    """The last scores of a run that is done, and the seconds it took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "edit/exact" in line)
    return {name: last[name] for name in FIGURES} | {"seconds": last["seconds"]}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Means and, of several seeds, standard deviations in percent, as Markdown."""
    lines = ["| | " + " | ".join(FIGURES.values()) + " | seeds |",
             "|---" * (len(FIGURES) + 2) + "|"]
    for name, found in rows.items():
        cells = []
        for figure in FIGURES:
            values = [100 * f[figure] for f in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(found)} |")
    return "\n".join(lines) + "\n"


def plot(results, file: Path) -> None:
    """Bars of means with a point for each seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), len(FIGURES), squeeze=False, layout="constrained",
                                figsize=(4 * len(FIGURES), 2.4 * len(results)))
    for row, (name, found) in zip(axes, results.items()):
        for axis, (key, title) in zip(row, FIGURES.items()):
            for i, values in enumerate(found.values()):
                shares = [100 * v[key] for v in values]
                axis.barh(i, statistics.mean(shares), color="#9db8d9")
                axis.plot(shares, [i] * len(shares), "o", color="#1f3b63", markersize=4)
            shown = row[0] is axis
            axis.set_yticks(range(len(found)), list(found) if shown else [""] * len(found))
            axis.invert_yaxis()
            axis.set_title(f"{name}: {title}, %", fontsize=9)
    figure.savefig(file, dpi=120)


def collect(folder: Path, tables, seeds) -> dict:
    """What is done so far, by table and row, written as figures, tables and a plot."""
    results = {}
    for name, rows in tables.items():
        found = {row: [scores(path) for seed in seeds if (
            path := place(folder, name, row, seed)) and (path / "model").exists()] for row in rows}
        results[name] = {row: values for row, values in found.items() if values}
    results = {name: rows for name, rows in results.items() if rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, rows in results.items():
        (folder / f"{name}.md").write_text(table(rows))
    try:
        plot(results, folder / "ablations.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    return results


def place(folder: Path, table: str, row: str, seed: int) -> Path:
    return folder / table / row.replace(", ", "-").replace(" ", "_") / f"seed{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    tables = runs(args.nano)
    args.dir.mkdir(parents=True, exist_ok=True)
    jobs = [(place(args.dir, name, row, seed), arguments, seed) for seed in args.seeds
            for name, rows in tables.items() for row, arguments in rows.items()]
    cores, free = Queue(), sorted(os.sched_getaffinity(0))
    for i in range(args.jobs):
        cores.put(set(free[i::args.jobs]) or set(free))
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        waiting = [pool.submit(train, path, arguments, args.steps, seed, cores)
                   for path, arguments, seed in jobs]
        for done in waiting:
            done.result()
            bar.update()
            collect(args.dir, tables, args.seeds)
    for name, rows in collect(args.dir, tables, args.seeds).items():
        print(f"\n{name}\n{table(rows)}")


if __name__ == "__main__":
    main()
