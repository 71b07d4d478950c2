"""Text recognition and detection in int8: trains both, and prints what int8 costs.

python -m examples.ocr                  # one seed
python -m examples.ocr --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.ocr.comparison import TASKS, Budget, Scores, compare
from qat_lightning.cli.console import ignore_advice

LARGEST_LOSS = 1.0
"""The points of any metric that int8 training may lose against float, averaged over the seeds."""


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, default=16, help="epochs of float training")
    parser.add_argument(
        "--tuning", type=int, default=4, help="epochs of training for int8, and of float more"
    )
    parser.add_argument("--tested", type=int, default=2000, help="images to test with")
    parser.add_argument(
        "--images", type=int, help="new images in each epoch; by default 4096 lines, 1536 pages"
    )
    parser.add_argument("--largest-loss", type=float, default=LARGEST_LOSS, help="points that int8 may lose")
    parser.add_argument("--folder", type=Path, default=Path("outputs/ocr"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_advice()

    budget = Budget(args.epochs, args.tuning, args.tested, args.images)
    console, results = Console(soft_wrap=True), dict[str, list[Scores]]()
    for name in args.tasks:
        for seed in args.seeds:
            begin = time.monotonic()
            folder = args.folder / f"{name}-{seed}"
            scores = compare(TASKS[name], budget, seed, folder)
            (folder / "scores.json").write_text(json.dumps(scores))
            reached = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in scores["float"].items())
            console.print(
                f"{name}, seed {seed}, {time.monotonic() - begin:.0f} s: float {reached}", highlight=False
            )
            results.setdefault(name, []).append(scores)
    for name, runs in results.items():
        console.print(table(name, runs))
    lost = 100 * max(loss(runs) for runs in results.values())
    worst = 100 * max(loss([run]) for runs in results.values() for run in runs)
    result = f"int8 lost {lost:.2f} points of a metric in the mean, and {worst:.2f} in one run."
    console.print(result, highlight=False)
    sys.exit("This is too much." if lost > args.largest_loss else None)


def table(name: str, runs: list[Scores]) -> Table:
    """Returns the mean of each metric for each form, and in brackets the difference from float in points."""
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
    """Returns the mean of a metric over the seeds."""
    return statistics.mean(scores[form][metric] for scores in runs)


def loss(runs: list[Scores]) -> float:
    """Returns the largest loss of any metric in any form that was trained for int8."""
    forms = [form for form in runs[0] if form not in ("float", "int8, not trained")]
    metrics = runs[0]["float"]
    return max(mean_of(runs, "float", m) - mean_of(runs, form, m) for form in forms for m in metrics)


if __name__ == "__main__":
    main()
