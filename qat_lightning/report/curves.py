"""Records the curves of a run: the metrics of each epoch, and when the phases began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat_lightning.report.content import Epoch, Mark


class Curves:
    """Records the curves of a run. Checkpoints contain them, so that a resumed run has every epoch.

    Attributes:
        epochs: The metrics that each epoch logged.
        marks: What began with which epoch.
    """

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self.marks: list[Mark] = []

    def clear(self) -> None:
        """Forgets an earlier run."""
        self.epochs, self.marks = [], []

    def record(self, epoch: int, metrics: Mapping[str, Any], learning_rate: float) -> None:
        """Records an epoch's metrics, replacing earlier ones of the same epoch.

        Metrics that are not a single number are left out.
        """
        if self.epochs and self.epochs[-1].epoch == epoch:
            self.epochs.pop()
        values = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        self.epochs.append(Epoch(epoch, {**values, "learning rate": learning_rate}))

    def mark(self, epoch: int, what: str) -> None:
        """Records that something began with an epoch. A second mark of the same thing is ignored."""
        if what not in [mark.what for mark in self.marks]:
            self.marks.append(Mark(epoch, what))

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves as plain values."""
        return {
            "epochs": [(each.epoch, each.metrics) for each in self.epochs],
            "marks": [(each.epoch, each.what) for each in self.marks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the curves that `state_dict` returned."""
        self.epochs = [Epoch(epoch, dict(metrics)) for epoch, metrics in state["epochs"]]
        self.marks = [Mark(epoch, what) for epoch, what in state["marks"]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (getattr(value, "numel", lambda: 0)() == 1)
