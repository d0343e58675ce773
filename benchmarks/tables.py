"""Tables of many small runs, each of which is one or more `unipic` commands: made side by side on
cores of their own, stopped at will, and collected as figures, Markdown and a plot."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from tqdm import tqdm

FIGURES = {"generate/exact": "generation", "edit/exact": "edit", "edit/preserved": "preservation"}


class Step(NamedTuple):
    """A run of `unipic train` or `reinforce` in a folder of its own, from the model of another."""

    name: str  # of its folder
    command: str
    arguments: tuple[str, ...]
    before: "Step | None" = None  # "{before}" in an argument is the folder of this one's model


Tables = Mapping[str, Mapping[str, tuple[Step, int]]]
"""By table and row: its last step, and how many seeds it has. Rows may share their first steps."""


def place(folder: Path, step: Step, seed: int) -> Path:
    return folder / step.name / f"seed{seed}"


def make(folder: Path, step: Step, start: str, seed: int, cores: Queue,
         earlier: Future | None) -> None:
    """A step with a seed, once the one before it is done, on cores that no other run has.

    Raises CalledProcessError where a command fails; what it said is in a log beside its folder.
    """
    if earlier:
        earlier.result()
        start = str(place(folder, step.before, seed) / "model")
    workdir = place(folder, step, seed)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unipic_jax", step.command, "--workdir", str(workdir),
               f"--config.seed={seed}", *(a.replace("{before}", start) for a in step.arguments)]
    if not (workdir / "model").exists():
        mine = cores.get()
        try:
            with workdir.with_suffix(".log").open("a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: os.sched_setaffinity(0, mine))
        finally:
            cores.put(mine)
    done = workdir.with_suffix(".json")
    done.with_suffix(".part").write_text(json.dumps(scores(workdir)) + "\n")
    done.with_suffix(".part").rename(done)  # whole or not there: others look for it


def scores(workdir: Path) -> dict[str, float]:
    """The last scores of a run that is done, and the seconds it took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "edit/exact" in line)
    return {name: last[name] for name in FIGURES} | {
        "seconds": max(line.get("seconds", 0) for line in lines)}


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
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

    figure, axes = plt.subplots(
        len(results), len(FIGURES), squeeze=False, layout="constrained",
        figsize=(4 * len(FIGURES), sum(0.8 + 0.4 * len(rows) for rows in results.values())),
        height_ratios=[0.8 + 0.4 * len(rows) for rows in results.values()])
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


def collect(folder: Path, tables: Tables, plot_name: str) -> dict:
    """What is done so far, by table and row, written as figures, tables and a plot."""
    results = {}
    for name, rows in tables.items():
        found = {row: [json.loads(file.read_text()) for seed in range(seeds)
                       if (file := place(folder, step, seed).with_suffix(".json")).exists()]
                 for row, (step, seeds) in rows.items()}
        results[name] = {row: values for row, values in found.items() if values}
    results = {name: rows for name, rows in results.items() if rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, rows in results.items():
        (folder / f"{name}.md").write_text(table(rows))
    try:
        if results:
            plot(results, folder / plot_name)
    except ImportError:
        print("no plot: matplotlib is not installed")
    return results


def run(folder: Path, tables: Tables, start: str, jobs: int, plot_name: str) -> None:
    """Make all runs that are not done, the first seeds of all rows first, and print the tables.

    What is kept of a run is the file of its scores; its folder may go, unless a run that is not
    done begins with its model, which is then made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sorted(dict.fromkeys(
        (seed, step) for rows in tables.values() for step, seeds in rows.values()
        for seed in range(seeds) if not place(folder, step, seed).with_suffix(".json").exists()),
        key=lambda one: one[0])
    cores, free = Queue(), sorted(os.sched_getaffinity(0))
    for i in range(jobs):
        cores.put(set(free[i::jobs]) or set(free))
    runs = {}

    def submit(step, seed):
        if (step.name, seed) not in runs:
            earlier = step.before and submit(step.before, seed)
            runs[step.name, seed] = pool.submit(make, folder, step, start, seed, cores, earlier)
        return runs[step.name, seed]

    # As many threads as rows: most of them wait for cores.
    threads = max(1, len(wanted))
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(wanted), unit="run") as bar:
        for done in as_completed([submit(step, seed) for seed, step in wanted]):
            done.result()
            bar.update()
            collect(folder, tables, plot_name)
    for name, rows in collect(folder, tables, plot_name).items():
        print(f"\n{name}\n{table(rows)}")
