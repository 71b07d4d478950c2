"""`NetworkReport`: the result of a preflight for one network, as values and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """A part of a network that is not plain int8.

    Attributes:
        name: Name of the module, or of the operation.
        kind: Its type.
        why: The reason.
        line: The line of the user's code that calls it, as `file:line: code`.
        macs: Multiply-adds of one call on the preflight's inputs; 0 if it is not a layer with weights.
    """

    name: str
    kind: str
    why: str
    line: str
    macs: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.why}, {self.line}"


@dataclass(frozen=True)
class NetworkReport:
    """The result for one network.

    Attributes:
        name: Its name in the LightningModule, `""` for the module itself.
        kind: Its class.
        mode: `"eager"` or `"fx"`.
        backend: The engine of the int8 network.
        layers: Number of layers with weights that become int8.
        fused: Number of fused layers of each kind, such as `{"Conv2d+BatchNorm2d+ReLU": 17}`.
        relu6: Number of ReLU6 that became ReLU.
        float_layers: Layers with weights that stay float.
        batch_norms: Batch-norms that are not fused into the layer before them.
        float_ops: Float operations between int8 operations. Each costs a dequantization and a quantization.
        int8_share: Share of the multiply-adds that is int8, 0 to 1.
        sqnr: SQNR between the fake-quant and the int8 outputs, in dB, on the preflight's inputs.
        seconds: Duration of the preflight.
    """

    name: str
    kind: str
    mode: str
    backend: str
    layers: int
    fused: dict[str, int]
    relu6: int
    float_layers: tuple[Finding, ...]
    batch_norms: tuple[Finding, ...]
    float_ops: tuple[Finding, ...]
    int8_share: float
    sqnr: float
    seconds: float

    def __str__(self) -> str:
        total = self.layers + len(self.float_layers)
        notes = [
            f"{what}: {len(found)}"
            for found, what in (
                (self.batch_norms, "batch-norms not fused"),
                (self.float_ops, "float operations between int8 ones"),
            )
            if found
        ]
        return "; ".join(
            [
                f"{self.name or self.kind}: {self.layers} of {total} layers int8, {self.int8_share:.1%} of "
                "the multiply-adds",
                *notes,
            ]
        )


def preflight_table(reports: Iterable[NetworkReport]) -> Table:
    """Returns a table for the terminal: what was fused, and what stays float and why."""
    table = Table(title="Preflight", show_lines=False)
    for column in ("network", "what", "which"):
        table.add_column(column, overflow="fold")
    for report in reports:
        name = report.name or report.kind
        table.add_section()
        table.add_row(
            name, "int8 share", f"{report.int8_share:.1%} of the multiply-adds, {report.layers} layers"
        )
        table.add_row("", "int8 against fake-quant", f"{report.sqnr:.1f} dB")
        table.add_row("", "mode, backend", f"{report.mode}, {report.backend}")
        fused = ", ".join(f"{count} {kind}" for kind, count in report.fused.items())
        table.add_row("", "fused", fused or "nothing")
        if report.relu6:
            table.add_row("", "ReLU6 became ReLU", str(report.relu6))
        for what, findings in (
            ("stays float", report.float_layers),
            ("batch-norm not fused", report.batch_norms),
            ("float between int8", report.float_ops),
        ):
            for finding in findings:
                table.add_row("", what, str(finding))
    return table
