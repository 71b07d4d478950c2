from __future__ import annotations

import io
import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

DEMO: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parent.parent / "examples" / "demo.py"), run_name="demo"
)


@pytest.mark.parametrize(
    ("float_accuracy", "int8_accuracy", "wrong"),
    [
        (0.99, 0.985, None),
        (0.98, 0.99, None),
        (0.97, 0.965, "96.50 %, below 97.00 %"),
        (0.99, 0.975, "lost 1.50 %"),
    ],
)
def test_verdict(float_accuracy: float, int8_accuracy: float, wrong: str | None) -> None:
    message = DEMO["verdict"](float_accuracy, int8_accuracy)
    assert message is None if wrong is None else wrong in message


def test_table_shows_what_was_measured() -> None:
    slow, fast = DEMO["latencies"](runs=6)
    assert min(slow, fast) > 0
    accuracies = {f"{name}_accuracy": 0.98 for name in ("float", "fake_quant", "int8")}
    result = {**accuracies, "float_bytes": 234_000, "int8_bytes": 70_000}
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(DEMO["table"](result, result, slow, fast))
    shown = capture.get()
    assert "latency only: ResNet-18, random weights" in shown
    assert f"{1000 * fast:.1f} ms" in shown
    assert shown.count("98.00 %") == 3
    assert "234 kB" in shown
    assert "70 kB" in shown
