"""The command `qat-report`: rebuilds the report of a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from qat_lightning.analysis.scoring import score_on_test
from qat_lightning.cli import resolvers
from qat_lightning.cli.auto_resume import CONFIG, METRICS
from qat_lightning.cli.console import ignore_advice
from qat_lightning.cli.report_of_run import caught, finished_run
from qat_lightning.quantize.convert import convert
from qat_lightning.quantize.int8_file import load_qat_checkpoint
from qat_lightning.report.build import JSON, FinishedRun, publish, write
from qat_lightning.report.content import Report
from qat_lightning.report.curves import Curves
from qat_lightning.report.terminal import print_report
from qat_lightning.run.checkpoints import checkpoints_in, newest_usable


def main(arguments: list[str] | None = None) -> None:
    """Writes `report.html` and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="qat-report",
        description="Rebuilds the page of a run from its report.json. With --measure, or without a "
        "report.json, measures layers and speeds again from the run's checkpoint and files.",
    )
    parser.add_argument("run_dir", type=Path, help="the folder of the run")
    parser.add_argument("--measure", action="store_true", help="measure again; needs a run of qat-train")
    args = parser.parse_args(arguments)
    ignore_advice()
    try:
        page = rebuild(args.run_dir, measure=args.measure)
    except (ValueError, OSError) as error:
        sys.exit(f"qat-report: {error}")
    print(f"Report: {page}")


def rebuild(folder: Path, *, measure: bool = False) -> Path:
    """Rebuilds the report of a run, and prints it.

    Args:
        folder: The folder of the run. It holds a `report.json`, or what `qat-train` wrote.
        measure: Whether to measure layers and speeds again. Accuracies are taken from `metrics.json`.

    Returns:
        The path of the page.

    Raises:
        ValueError: The folder holds neither, or a report of another version.
    """
    if (folder / JSON).is_file() and not measure:
        report = Report.from_json((folder / JSON).read_text(encoding="utf-8"))
        page = write(report, folder)
        print_report(report)
        return page
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, so there is nothing to measure. Pass the folder of a finished run "
                f"of qat-train, or a folder with the {JSON} that the callback wrote with report=True."
            )
    return publish(_load_finished_run(folder), folder)


def _load_finished_run(folder: Path) -> FinishedRun:
    """Loads a finished run from its folder, even if the folder was moved."""
    resolvers.register()
    cfg = OmegaConf.load(folder / CONFIG)
    assert isinstance(cfg, DictConfig)
    metrics = json.loads((folder / METRICS).read_text())
    if "exported" not in metrics:
        raise ValueError(f"{folder} is a float run: it has no int8 network to report on.")
    metrics["exported"] = {str(folder / Path(path).name): each for path, each in metrics["exported"].items()}
    checkpoint = _checkpoint(folder, metrics["checkpoint"])
    data = instantiate(cfg.data, _convert_="all")
    trained = load_qat_checkpoint(checkpoint, instantiate(cfg.classifier, _convert_="all"))
    with caught(trained) as inputs:
        score_on_test(trained, data, limit_test_batches=1)
    return finished_run(cfg, metrics, trained, convert(trained), inputs, _curves(checkpoint))


def _checkpoint(folder: Path, stored: str) -> Path:
    """Returns the checkpoint that was converted; for the last weights, the newest one."""
    moved = [path for path in checkpoints_in(folder) if path.name == Path(stored).name]
    found = moved[0] if moved else newest_usable(checkpoints_in(folder))
    if found is None:
        raise ValueError(f"{folder} has no checkpoint to measure.")
    return Path(found)


def _curves(checkpoint: Path) -> Curves:
    curves = Curves()
    states: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
    for name, state in states.items():
        if name.startswith("QuantizationAwareTraining") and "curves" in state:
            curves.load_state_dict(state["curves"])
    return curves
