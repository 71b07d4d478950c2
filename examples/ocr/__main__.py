"""Text recognition and detection in int8: trains both, and prints what int8 costs.

python -m examples.ocr                  # one seed
python -m examples.ocr --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.ocr.comparison import TASKS, Budget, Scores, compare
from qat_lightning.console import ignore_advice

LARGEST_LOSS = 0.01
"""Of any metric, from float to a file that is shipped."""


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, default=8, help="epochs of float training")
    parser.add_argument(
        "--tuning", type=int, default=3, help="epochs of training for int8, and of float more"
    )
    parser.add_argument("--images", type=int, default=4096, help="new images in each epoch")
    parser.add_argument("--tested", type=int, default=2000, help="images to test with")
    parser.add_argument("--folder", type=Path, default=Path("outputs/ocr"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_advice()

    budget = Budget(args.epochs, args.tuning, args.images, args.tested)
    console, results = Console(soft_wrap=True), dict[str, list[Scores]]()
    for name in args.tasks:
        for seed in args.seeds:
            begin = time.monotonic()
            scores = compare(TASKS[name], budget, seed, args.folder / f"{name}-{seed}")
            console.print(f"{name}, seed {seed}: {time.monotonic() - begin:.0f} s", highlight=False)
            results.setdefault(name, []).append(scores)
    for name, runs in results.items():
        console.print(table(name, runs))
    losses = [loss for runs in results.values() for loss in losses_of(runs)]
    sys.exit(f"int8 lost {100 * max(losses):.2f} points." if max(losses) > LARGEST_LOSS else None)


def table(name: str, runs: list[Scores]) -> Table:
    """The mean of each metric for each form, and in brackets how much more than float it is, in points."""
    rows = Table(title=f"{name}, percent of {len(runs)} runs")
    metrics = list(runs[0]["float"])
    for column in ("form", *metrics):
        rows.add_column(column, justify="left" if column == "form" else "right")
    for form in runs[0]:
        cells = [100 * mean_of(runs, form, metric) for metric in metrics]
        more = [100 * mean_of(runs, form, m) - 100 * mean_of(runs, "float", m) for m in metrics]
        rows.add_row(form, *(f"{a:.2f} ({b:+.2f})" for a, b in zip(cells, more, strict=True)))
    return rows


def mean_of(runs: list[Scores], form: str, metric: str) -> float:
    """The mean of a metric over the seeds."""
    return statistics.mean(scores[form][metric] for scores in runs)


def losses_of(runs: list[Scores]) -> list[float]:
    """What each metric of the trained int8 forms has lost against float, in the mean over the seeds."""
    forms = [form for form in runs[0] if form not in ("float", "int8, not trained")]
    return [
        mean_of(runs, "float", metric) - mean_of(runs, form, metric)
        for form in forms
        for metric in runs[0]["float"]
    ]


if __name__ == "__main__":
    main()
