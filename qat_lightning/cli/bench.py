"""The command `qat-bench`: measures the speed of exported files on this machine, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from qat_lightning.base.atomic import replacing
from qat_lightning.cli.bench_files import BenchFile, batches_of, common_signatures, example_of, load
from qat_lightning.cli.console import ignore_advice, kilobytes
from qat_lightning.export.executed import in_words
from qat_lightning.report.content import Machine, Speed
from qat_lightning.report.machine import describe, has_vnni, usable_cores
from qat_lightning.report.speed import BATCHES, Candidate, measure, of_batch

VERSION = 1
_NOISE = 0.5
"""Spread, as a share of the median, above which a speed means little."""
_EXPECTED = (OSError, ValueError, RuntimeError, ImportError, HydraException, OmegaConfBaseException)


def main() -> int:
    """Measures the files that the command line names, and prints a table.

    Returns:
        The exit status: 0, or 1 if a file cannot be measured. The reason goes to standard error.
    """
    options = parser().parse_args()
    ignore_advice()
    try:
        run(options)
    except _EXPECTED as error:
        message = " ".join(str(error).split()).replace("pass verify=False", "pass --no-verify")
        print(f"qat-bench: error: {message}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Measures the files in `options`, and prints a table.

    Raises:
        ValueError: A file cannot be read or run, or the files take different inputs.
        FileNotFoundError: There is no such file.
        MissingExtraError: The extra of a runtime is not installed.
    """
    console = Console(
        soft_wrap=True, width=None if sys.stdout.isatty() else 160
    )  # wide enough for whole lines in a file
    verify = not options.no_verify
    with console.status("loading") if console.is_terminal else nullcontext():
        files = [load(path, threads=options.threads, verify=verify) for path in options.files]
        signatures = common_signatures(files, options.shape, verify=verify)
        batches = batches_of(signatures, options.batch, BATCHES)
        example = example_of(signatures, files)
        for each in files:
            _try(each, *of_batch(example, batches[0]))
    names = _names(options.files)
    speeds = measure(
        [[Candidate(n, each.runtime, each.network) for n, each in zip(names, files, strict=True)]],
        example,
        batches=batches,
        threads=options.threads,
        seconds=options.seconds,
        console=console,
    )
    machine = describe(options.threads)
    by_name = dict(zip(names, files, strict=True))
    console.print(_table(speeds, by_name, machine))
    for note in _notes(speeds, by_name, machine):
        console.print(note, highlight=False)
    if options.json is not None:
        with replacing(options.json) as partial:
            partial.write_text(json.dumps(_content(speeds, by_name, machine), indent=1) + "\n")


def _try(file: BenchFile, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        with torch.inference_mode():
            file.network(*args, **kwargs)
    except Exception as error:  # the runtimes have a separate class for each kind of failure
        raise ValueError(
            f"{file.path} was loaded, but {file.runtime} cannot run it on inputs that it should take: {error}"
        ) from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the names of the files, or their paths if two names are equal."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _table(speeds: Sequence[Speed], files: dict[str, BenchFile], machine: Machine) -> Table:
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)} on {machine.cores} cores"
    table = Table(title=f"{machine.cpu} ({', '.join(machine.features) or 'features unknown'}), {threads}")
    table.add_column("file", overflow="fold")
    table.add_column("runtime", no_wrap=True)
    for column in ("batch", "median, ms", "inputs/s", "speedup", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, speed in enumerate(speeds):
        table.add_row(
            speed.name,
            speed.runtime,
            str(speed.batch),
            f"{speed.milliseconds:.2f} ± {speed.spread:.2f}",
            f"{speed.per_second:,.0f}",
            "first" if speed.speedup is None else f"{speed.speedup:.2f} x",
            kilobytes(files[speed.name].bytes),
            end_section=(index + 1) % len(files) == 0,
        )
    return table


def _notes(speeds: Sequence[Speed], files: dict[str, BenchFile], machine: Machine) -> list[str]:
    """Returns notes: why int8 may be no faster, and whether speeds vary a lot."""
    notes = [
        f"{name}: {in_words(each.float_operations)}." for name, each in files.items() if each.float_operations
    ]
    if any(each.int8 for each in files.values()) and not has_vnni(machine):
        notes.append("This CPU has no known int8 dot products (VNNI), so int8 is hardly faster than float.")
    if any(each.spread > _NOISE * each.milliseconds for each in speeds):
        notes.append(
            "Speeds varied a lot between calls: something else used the CPU. Measure again when it is idle."
        )
    return notes


def _content(speeds: Sequence[Speed], files: dict[str, BenchFile], machine: Machine) -> dict[str, Any]:
    return {
        "version": VERSION,
        "machine": dataclasses.asdict(machine),
        "files": [
            {
                "name": name,
                "path": str(each.path),
                "runtime": each.runtime,
                "int8": each.int8,
                "bytes": each.bytes,
                "float_operations": dict(each.float_operations.most_common()),
            }
            for name, each in files.items()
        ],
        "speeds": [{**dataclasses.asdict(each), "per_second": each.per_second} for each in speeds],
    }


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="qat-bench",
        description="Measures how fast files run on this CPU. In each round the files run one after the "
        "other, and speed-ups are against the first file. The network of a .pt file is built from the "
        "config.yaml of its run beside it, which names code to run: measure only .pt files that you trust.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".onnx, .xml (OpenVINO) or .pt")
    parser.add_argument(
        "--batch", nargs="+", type=_positive, metavar="N", help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=usable_cores(),
        metavar="N",
        help="number of threads (default: one per usable core)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=3.0,
        metavar="S",
        help="how long to measure each file at each batch size (default: 3)",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="3,224,224",
        help="shape of an input without the batch, if the files leave it open",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not check the files against manifest.json"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, but received {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, but received {text!r}")
    return seconds


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_positive, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be like 3,224,224, but received {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
