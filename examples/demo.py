"""`make demo`: float baseline, QAT and int8 on real digits, by the command line that users type.

Run it with `python examples/demo.py`; it takes about a minute and writes to outputs/demo/. It exits
with an error if the int8 network is worse than it has to be.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18

from qat_lightning import convert, prepare
from qat_lightning.cli.console import kilobytes, percent

LEAST_ACCURACY = 0.97
LARGEST_LOSS = 0.01  # int8 against float

console = Console(soft_wrap=True)


def main() -> None:
    """Runs the demo."""
    folder = Path("outputs/demo") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    baseline = qat_train("experiment=digits_float", folder / "float")
    weights = f"weights={folder / 'float' / 'float.pt'}"
    result = qat_train("experiment=digits_demo", weights, folder / "int8")
    console.print("\nTiming ResNet-18, float against int8 …")
    console.print(table(baseline, result, *latencies()))
    console.print(f"float weights: {baseline['float_path']}", highlight=False)
    console.print(f"int8 network:  {result['int8_path']}", highlight=False)
    console.print(f"everything:    {folder}/", highlight=False)
    sys.exit(verdict(result["float_accuracy"], result["int8_accuracy"]))


def qat_train(*arguments: str | Path) -> dict[str, Any]:
    """Prints and runs a command; the last argument is its run folder. Returns its metrics."""
    *overrides, folder = arguments
    command = [*map(str, overrides), f"hydra.run.dir={folder}"]
    console.print(f"\n[bold]$ qat-train {shlex.join(command)}[/bold]", highlight=False)
    # A network this small gains nothing from threads, and loses much where others use the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "qat_lightning", *command], check=True, env=environment)
    metrics: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return metrics


def latencies(runs: int = 25) -> tuple[float, float]:
    """Returns the median seconds of ResNet-18 on one 224x224 image, in float and in int8.

    The weights are random, so only the time means something. Runs take turns, so that whatever else
    the machine does slows down both.
    """
    image = torch.randn(1, 3, 224, 224)
    network = resnet18().eval()
    prepared = prepare(resnet18(), backend="x86")
    prepared(torch.randn(2, 3, 224, 224))  # ranges for the conversion
    networks = network, convert(prepared)
    times: list[list[float]] = [[seconds(each, image) for each in networks] for _ in range(runs)]
    floats, int8s = zip(*times[5:], strict=True)  # the first ones warm up
    return statistics.median(floats), statistics.median(int8s)


def seconds(network: nn.Module, image: Tensor) -> float:
    """Returns the time of one forward pass."""
    with torch.inference_mode():
        start = time.perf_counter()
        network(image)
        return time.perf_counter() - start


def table(baseline: dict[str, Any], result: dict[str, Any], slow: float, fast: float) -> Table:
    """Returns the results as one table."""
    rows = Table("", *(f"[bold]{name}" for name in ("float", "fake-quant", "int8")))
    names = ("float_accuracy", "fake_quant_accuracy", "int8_accuracy")
    rows.add_row("digits: accuracy on the test split", *(percent(result[name]) for name in names))
    sizes = kilobytes(baseline["float_bytes"]), "", kilobytes(result["int8_bytes"])
    rows.add_row("digits: file size", *sizes, end_section=True)
    label = f"latency only: ResNet-18, random weights, 1x3x224x224, {torch.get_num_threads()} threads"
    rows.add_row(label, f"{1000 * slow:.1f} ms", "", f"{1000 * fast:.1f} ms")
    return rows


def verdict(float_accuracy: float, int8_accuracy: float) -> str | None:
    """Returns what is wrong with the accuracies, or None."""
    if int8_accuracy < LEAST_ACCURACY:
        return f"int8 accuracy is {percent(int8_accuracy)}, below {percent(LEAST_ACCURACY)}."
    if float_accuracy - int8_accuracy > LARGEST_LOSS:
        return f"int8 lost {percent(float_accuracy - int8_accuracy)} of accuracy against float."
    return None


if __name__ == "__main__":
    main()
