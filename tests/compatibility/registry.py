"""The registry: what of Lightning works beside the callback. Each row stands over the run that proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Proof = Callable[[Path], None]
ROWS: list[Row] = []

_HEAD = """\
# Compatibility

This page lists what works with `QuantizationAwareTraining` (here `qat`) in a Lightning run. A run in
[tests/compatibility](../tests/compatibility) proves each row, and `python -m tests.compatibility` prints this
page. A refusal is an error before the first step, with the reason and the fix. Runs of several processes have
their own page: [distributed.md](distributed.md).
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: The heading it stands under.
        feature: What is combined with the callback.
        how: How, in code.
        verdict: "works", with what is to be known; or "refused", with the reason.
        proof: A run in a folder of its own, which asserts that both did their work.
    """

    section: str
    feature: str
    how: str
    verdict: str
    proof: Proof

    def __str__(self) -> str:
        return self.proof.__name__

    @property
    def file(self) -> str:
        """The file of the proof, as seen from docs/."""
        return f"../{self.proof.__module__.replace('.', '/')}.py"


class Section:
    """Registers the rows of one heading, in the order in which they are written."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __call__(self, feature: str, how: str, verdict: str) -> Callable[[Proof], Proof]:
        def register(proof: Proof) -> Proof:
            ROWS.append(Row(self.title, feature, how, verdict, proof))
            return proof

        return register


def page() -> str:
    """The whole of docs/compatibility.md."""
    text = _HEAD
    for section in dict.fromkeys(row.section for row in ROWS):
        text += f"\n## {section}\n\n| Feature | How | Verdict | Proof |\n| --- | --- | --- | --- |\n"
        for row in ROWS:
            if row.section == section:
                how = row.how.replace("|", "\\|")
                text += f"| {row.feature} | `{how}` | {row.verdict} | [{row}]({row.file}) |\n"
    return text
