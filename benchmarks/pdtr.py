"""The report's table 4 on the nano family: what reinforcement on one task does to both.

    python -m benchmarks.pdtr --model KONTEXT --dir RUNS [--judge JUDGE] [--seeds 3] [--jobs 2]

KONTEXT is an under-trained model, as docs/reproduction.md has it, and JUDGE what
configs/nano/judge.py has made. "none" is the model itself, scored as the runs are. Stopped, the
same command goes on where it was. RUNS/results.json, RUNS/table4.md and, with matplotlib,
RUNS/pdtr.png are made anew each time from the runs that are done.
"""

import argparse
from pathlib import Path

from benchmarks import tables
from benchmarks.tables import Step

BLOCKS = 64  # held-out scenes of each kind


def rows(judge: str, seeds: int) -> tables.Tables:
    """What each row runs; the last ones with one seed only."""

    def stage(name, task, *more, before=None):
        return Step(name, "reinforce", (
            f"--config=configs/nano/rl_{task}.py", "--config.model={before}",
            "--config.samples.every=1000000", "--config.samples.at_start=False",
            f"--config.samples.blocks={BLOCKS}", *more), before)

    none = stage("none", "edit", "--config.optimizer.learning_rate=0.0", "--config.steps=1")
    edit, generate = stage("edit", "edit"), stage("generate", "generate")
    found = {
        "none": (none, 1),
        "edit": (edit, seeds),
        "text to image": (generate, seeds),
        "edit, then text to image": (stage("edit-generate", "generate", before=edit), seeds),
        "text to image, no edits kept": (
            stage("free", "generate", "--config.rl.learn.keep=0.0"), 1),
        "text to image, then edit": (stage("generate-edit", "edit", before=generate), 1),
        "both in turn": (stage("both", "edit", "--config.rl.task=both", "--config.steps=210"), 1)}
    if judge:
        judged = stage("judged", "edit", "--config.rl.reward={'judge': 1.0}",
                       f"--config.judge={judge}")
        found |= {"edit by the judge": (judged, 1),
                  "edit by the judge, then text to image": (
                      stage("judged-generate", "generate", before=judged), 1)}
    return {"table4": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--judge", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    tables.run(args.dir, rows(args.judge, args.seeds), args.model, args.jobs,
               "pdtr.png")


if __name__ == "__main__":
    main()
