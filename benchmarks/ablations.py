"""The report's tables 2 and 3 on the nano family: who sees the picture of an edit, and what trains.

    python -m benchmarks.ablations --nano DIR --dir RUNS [--steps 500] [--seeds 3] [--jobs 2]

DIR is what `launch/nano.sh DIR` has made. Every row of a table starts from the same parts and sees
the same number of pictures, with a seed of its own for what it draws; its scores are of held-out
scenes. Stopped, the same command goes on where it was. RUNS/results.json, RUNS/table2.md,
RUNS/table3.md and, with matplotlib, RUNS/ablations.png are made anew each time from the runs that
are done.
"""

import argparse
from pathlib import Path

from benchmarks import tables
from benchmarks.tables import Step

STAGES = "configs/nano"
BLOCKS = 32  # held-out scenes of each kind


def rows(nano: Path, steps: int, seeds: int) -> tables.Tables:
    """What each row of each table runs."""
    base, kontext, align = (nano / n / "model" for n in ("base", "kontext", "align"))
    always = (f"--config.steps={steps}", "--config.samples.every=1000000", "--config.batch=32",
              f"--config.samples.blocks={BLOCKS}", "--config.checkpoint.keep=1")
    queries = (f"--config={STAGES}/unified.py", f"--config.mllm={nano / 'language/model'}",
               f"--config.conditioner={align / 'conditioner'}", *always)

    def names(field, *values):  # one name makes a tuple of one only with its comma
        return f"--config.{field}=({','.join(map(repr, values))},)"

    from_base = (*queries, f"--config.model={base}")
    unified = (*queries, f"--config.model={kontext}")
    found = {
        "table2": {  # all of them from the model that does not edit yet
            "Kontext, transformer": (f"--config={STAGES}/kontext.py", *always,
                                     "--config.data.sources.edit.weight=2.0",  # as unified.py
                                     f"--config.model={base}", names("trained", "transformer")),
            "MetaQuery, language model": (*from_base, names("source_to", "mllm")),
            "MetaQuery, transformer": (*from_base, names("source_to", "transformer")),
            "MetaQuery, both": (*from_base, names("source_to", "mllm", "transformer"))},
        "table3": {
            "connector frozen, transformer tuned": (*unified, names("trained", "transformer")),
            "connector tuned, transformer frozen": (*unified, names("trained", "conditioner")),
            "both tuned": (*unified, names("trained", "conditioner", "transformer"))}}
    return {table: {row: (Step(f"{table}/{row.replace(', ', '-').replace(' ', '_')}", "train",
                               arguments), seeds) for row, arguments in named.items()}
            for table, named in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    tables.run(args.dir, rows(args.nano, args.steps, args.seeds), "", args.jobs, "ablations.png")


if __name__ == "__main__":
    main()
