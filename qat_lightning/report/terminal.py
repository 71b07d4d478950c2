"""Prints a report on a terminal: findings, scores, speeds and the worst layers."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat_lightning.base import formats
from qat_lightning.report.content import Network, Report
from qat_lightning.report.rows import metric_names, score_rows, worst_first

MOST_METRICS = 2
MOST_LAYERS = 5
_TITLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the most important parts of a report.

    Args:
        report: The report. Its empty parts are left out.
        console: Where to print; by default the terminal.
    """
    # On a narrow or captured terminal, paths stay whole so that they can be copied.
    console = console or Console(soft_wrap=True)
    for table in tables(report):
        console.print(table)
        console.print()
    for score in report.scores:
        if score.file:
            console.print(_text(f"{f'{score.network}, {score.runtime}':24} {score.file}"), soft_wrap=True)


def tables(report: Report) -> list[Table]:
    """Returns tables of the findings, scores, speeds and worst layers, without empty tables."""
    found = [
        _findings(report),
        _scores(report),
        _speeds(report),
        *(_layers(each) for each in report.networks),
    ]
    return [table for table in found if table.row_count]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=_text(title), **_TITLE, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(_text(column), overflow="fold")
    for column in right:
        table.add_column(_text(column), justify="right", overflow="fold")
    return table


def _text(text: str) -> Text:
    return Text(formats.printable(text))


def _findings(report: Report) -> Table:
    table = Table(title="Findings", **_TITLE, box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for number, finding in enumerate(report.findings, 1):
        table.add_row(f"{number}.", _text(finding))
    return table


def _scores(report: Report) -> Table:
    names = metric_names(report.scores)[:MOST_METRICS]
    columns = [*names[:1], *["vs float"][: len(names)], *names[1:]]
    table = _table("How good it is", ("network", "runtime"), (*columns, "size", "smaller"))
    for row in score_rows(report.scores):
        first = [cell for pair in row.cells[:1] for cell in pair]
        others = [value for value, _ in row.cells[1:MOST_METRICS]]
        table.add_row(
            _text(row.score.network), _text(row.score.runtime), *first, *others, row.size, row.ratio
        )
    return table


def _speeds(report: Report) -> Table:
    machine = report.machine
    title = (
        f"How fast it is, on {machine.threads} of {machine.cores} cores of {machine.cpu or 'an unknown CPU'}"
    )
    table = _table(title, ("runtime", "network"), ("batch", "ms", "inputs/s", "speed-up"))
    for speed in report.speeds:
        table.add_row(
            _text(speed.runtime),
            _text(speed.name),
            str(speed.batch),
            f"{formats.milliseconds(speed.milliseconds)} ± "
            f"{formats.milliseconds(speed.spread, of=speed.milliseconds)}",
            f"{speed.per_second:,.0f}",
            "" if speed.speedup is None else formats.times(speed.speedup),
        )
    return table


def _layers(network: Network) -> Table:
    shown = worst_first(network.layers)[:MOST_LAYERS]
    of = f" of {network.name}" if network.name else ""
    title = f"The {len(shown)} worst of {len(network.layers)} int8 layers{of}"
    table = _table(title, ("layer",), ("fake-quant dB", "int8 dB", "loss dB", "clipped %"))
    for layer in shown:
        table.add_row(
            _text(layer.name),
            formats.decibels(layer.fake_quant_sqnr),
            formats.decibels(layer.int8_sqnr),
            formats.number(layer.loss, ".1f"),
            formats.share(layer.clipped),
        )
    return table
