"""How accurate int8 networks are after each method, on the same budget of epochs.

    python -m benchmarks.accuracy                                          # digits, minutes
    python -m benchmarks.accuracy --images FOLDER --tasks digits resnet20  # hours on two cores

FOLDER holds train/<class>/ and test/<class>/ with images of 32x32. Each network is trained in float, and
every method then goes on from the same weights for the same epochs, on the same batches with the same
augmentation; float too. `--methods` also takes variants of the recipe. Every result is kept in the
cache by task, method, seed and learning rate, so that an interrupted run continues where it was. Differences
from float are paired by seed; the interval is Student's t at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.methods import METHODS, Scores
from benchmarks.accuracy.tasks import Task, tasks
from benchmarks.accuracy.training import accuracy, outputs, train
from benchmarks.accuracy.variants import VARIANTS
from qat_lightning.base.atomic import replacing
from qat_lightning.base.quiet import quiet_torch_ao

_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 95 %, by the number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--every", type=int, default=1, help="train on every so-many-th photograph")
    parser.add_argument("--tasks", nargs="+", default=["digits"])
    parser.add_argument("--methods", nargs="+", choices=METHODS | VARIANTS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=0.002, help="learning rate that every method begins with")
    parser.add_argument("--cache", type=Path, default=Path("outputs/accuracy"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.cache.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    for task in tasks(args.images, args.tasks, args.every):
        rows: dict[str, list[Scores]] = {}
        for seed in args.seeds:
            for name in args.methods:
                rows.setdefault(name, []).append(score(task, name, seed, args))
        console.print(table(task, rows))


def score(task: Task, name: str, seed: int, args: argparse.Namespace) -> Scores:
    """Returns a method's accuracies, from the cache or by running it."""
    path = args.cache / f"{task.key}-{seed}-{name.replace(' ', '_')}-{args.lr:g}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    torch.manual_seed(seed)
    network = task.build()
    # What does not train starts from the float network that was trained as long as the others.
    tuned = args.lr if name in ("float", "post-training") else None
    network.load_state_dict(float_weights(task, seed, args.cache, tuned))
    with quiet_torch_ao():
        scores = (METHODS | VARIANTS)[name](task, network, seed, args.lr)
    with replacing(path) as partial:
        partial.write_text(json.dumps(scores))
    return scores


def float_weights(task: Task, seed: int, cache: Path, tuned: float | None = None) -> dict[str, Any]:
    """Returns the weights of the float training; with `tuned`, after further epochs at that learning rate."""
    path = cache / f"{task.key}-{seed}-float{'' if tuned is None else f'-tuned-{tuned:g}'}.pt"
    if not path.is_file():
        torch.manual_seed(seed)
        network = task.build()
        if tuned is None:
            train(task, network, seed, range(task.epochs), task.lr)
        else:
            network.load_state_dict(float_weights(task, seed, cache))
            train(task, network, seed, range(task.epochs, task.epochs + task.tuning), tuned)
        found = accuracy(outputs(network, task.test[0]), task.test[1])
        with replacing(path) as partial:
            torch.save(network.cpu().state_dict(), partial)
        Console().print(f"{path.name}: {found:.2f} %", highlight=False)
    weights: dict[str, Any] = torch.load(path, weights_only=True)
    return weights


def table(task: Task, rows: dict[str, list[Scores]]) -> Table:
    title = (
        f"{task.name}: test accuracy in percent, {task.epochs} + {task.tuning} epochs "
        f"of {len(task.train[1]):,} images"
    )
    result = Table(title=title, box=box.MARKDOWN)
    for column in ("method", "form", "mean", "spread", "vs float", "95 % interval"):
        result.add_column(column, justify="left" if column in ("method", "form") else "right")
    start = [scores["float"] for scores in rows.get("float", [])]
    for name, scores in rows.items():
        for form in scores[0]:
            values = [each[form] for each in scores]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            row = [name, form, f"{statistics.mean(values):.2f}", f"{spread:.2f}"]
            if start and name != "float":
                row += interval([a - b for a, b in zip(values, start, strict=True)])
            result.add_row(*row)
    return result


def interval(differences: list[float]) -> list[str]:
    """Returns the mean of paired differences and its 95 % interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return [f"{mean:+.2f}", ""]
    half = _T[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]


if __name__ == "__main__":
    main()
