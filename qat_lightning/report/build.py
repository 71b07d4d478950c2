"""Builds the report of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from qat_lightning.base.atomic import replacing
from qat_lightning.base.inputs import Inputs
from qat_lightning.quantize.batch_norms import restore_batch_norms
from qat_lightning.quantize.copies import copy_of
from qat_lightning.report.content import Report, Score
from qat_lightning.report.curves import Curves
from qat_lightning.report.file_speeds import file_speeds
from qat_lightning.report.findings import findings
from qat_lightning.report.machine import describe as describe_machine
from qat_lightning.report.networks import describe
from qat_lightning.report.terminal import print_report

JSON, HTML = "report.json", "report.html"
_PACKAGES = ("qat-lightning", "torch", "lightning", "onnxruntime", "openvino")


@dataclass(frozen=True)
class FinishedRun:
    """The results of a finished run.

    Attributes:
        title: What was trained.
        source: The checkpoint that was converted, or `"last"`.
        trained: The trained module, still prepared. It is not changed.
        int8: The module after conversion.
        inputs: The inputs to run each network of the module on, by the network's name.
        files: The exported files.
        scores: The metrics of every network and file, float first.
        curves: The metrics of every epoch.
    """

    title: str
    source: str
    trained: nn.Module
    int8: nn.Module
    inputs: Mapping[str, Inputs]
    files: Sequence[Path] = ()
    scores: Sequence[Score] = ()
    curves: Curves = field(default_factory=Curves)


def build(run: FinishedRun) -> Report:
    """Inspects every layer and measures every file, with as many threads as torch uses."""
    threads = torch.get_num_threads()
    module = copy_of(run.trained).cpu().eval()
    restore_batch_norms(module)
    measured = file_speeds(module, run.int8, run.inputs, run.files, threads)
    report = Report(
        title=run.title,
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        source=run.source,
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        machine=describe_machine(threads),
        scores=tuple(run.scores),
        speeds=measured.speeds,
        epochs=tuple(run.curves.epochs),
        marks=tuple(run.curves.marks),
        networks=tuple(
            describe(name, module.get_submodule(name), run.int8.get_submodule(name), inputs)
            for name, inputs in run.inputs.items()
        ),
    )
    return replace(report, findings=findings(report, measured.float_operations))


def publish(run: FinishedRun, folder: Path) -> Path:
    """Builds the report of a run, writes it to `folder`, and prints it.

    Returns:
        The path of the page.
    """
    report = build(run)
    page = write(report, folder)
    print_report(report)
    return page


def write(report: Report, folder: Path) -> Path:
    """Writes `report.json` and `report.html`, each complete or not at all.

    Returns:
        The path of the page.
    """
    from qat_lightning.report.page.html import render  # matplotlib takes a while to import

    for name, text in ((JSON, report.to_json()), (HTML, render(report))):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / HTML


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
