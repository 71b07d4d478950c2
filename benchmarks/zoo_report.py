"""Writes the zoo's figures as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.zoo_entry import Entry
from benchmarks.zoo_models import entries

HEAD = """# Zoo

Every classifier of torchvision, its quantizable variants, three dense predictors and the backbones of its
detectors, small networks of timm's families, and networks of transformers and ultralytics at their usual
size: prepared for x86 with an example of their input, trained one step on two samples, run once more in
training mode, converted, and compared. A backbone is also listed with frozen batch-norms, as it comes with
trained weights.

```console
$ python -m benchmarks.zoo
```

"""
COLUMNS = """
- **input**: height and width of the images, or the length of the texts.
- **int8**: the share of the float network's multiply-adds that int8 layers compute. The whole includes
  products between activations, which are never int8 layers.
- **SQNR**: how near the int8 outputs are to the fake-quant outputs, on the training batch, in dB; inf if they
  are equal bit for bit. If a network has many outputs, all of them count.
- **noise**: the SQNR of the fake-quant outputs against themselves, where everything that is rounded was
  multiplied by 1 ± 10⁻⁶ at random, as another order of additions would change it. The networks are random and
  have seen two samples, so a deep one amplifies each rounding that tips over. This is what int8 kernels that
  round in another order would reach.
- **s**: the CPU seconds that all of it takes in one thread.
- **torch**: what `prepare_qat_fx` and `convert_fx` do with the same network and the same example, or the
  error they end with.

| network | input | int8 | SQNR | noise | s | torch |
|---|---:|---:|---:|---:|---:|---|
"""


def report(figures: dict[str, Any]) -> str:
    """Returns the page, of the networks that have figures."""
    known = [entry for entry in entries() if "ours" in figures.get(entry.name, {})]
    failed = [entry for entry in known if not figures[entry.name]["ours"]["ok"]]
    summary = "\n".join(_summary(known, figures)) + "\n"
    reasons = "".join(f"- {entry.name}: {figures[entry.name]['ours']['reason']}\n" for entry in failed)
    parts = "".join(_parts(entry, figures[entry.name]["ours"]) for entry in known)
    rows = "".join(_row(entry, figures[entry.name]) for entry in known)
    return (
        HEAD
        + summary
        + (f"\nWhat fails, and why:\n\n{reasons}" if failed else "")
        + (
            f"\nParts that cannot be traced, and stay float (`untraceable='float'`):\n\n{parts}"
            if parts
            else ""
        )
        + COLUMNS
        + rows
    )


def _parts(entry: Entry, ours: dict[str, Any]) -> str:
    left = ours.get("untraceable", ())
    more = f" and {len(left) - 1} like it" if len(left) > 1 else ""
    return f"- {entry.name}: {left[0]}{more}\n" if left else ""


def _summary(known: list[Entry], figures: dict[str, Any]) -> Iterator[str]:
    yield "| | ours | equal bit for bit | families | torch's prepare_qat_fx |"
    yield "|---|---:|---:|---:|---:|"
    for source in dict.fromkeys(entry.source for entry in known):
        rows = [(entry, figures[entry.name]) for entry in known if entry.source == source]
        ok = [entry for entry, row in rows if row["ours"]["ok"]]
        theirs = [row["torch"]["ok"] for _, row in rows if "torch" in row]
        families = f"{len({e.family for e in ok})} of {len({e.family for e, _ in rows})}"
        equal = sum(figures[entry.name]["ours"]["sqnr"] == math.inf for entry in ok)
        yield (
            f"| {source} | {len(ok)} of {len(rows)} | {equal} | {families} | {sum(theirs)} of {len(theirs)} |"
        )


def _row(entry: Entry, row: dict[str, Any]) -> str:
    ours, theirs = row["ours"], row.get("torch")
    other = "" if theirs is None else "ok" if theirs["ok"] else theirs["error"]
    if not ours["ok"]:
        return f"| {entry.name} | {entry.size} | {ours['error']} | | | | {other} |\n"
    return (
        f"| {entry.name} | {entry.size} | {ours['share']:.0%} | {ours['sqnr']:.1f} | "
        f"{ours['floor']:.1f} | {ours['seconds']:.0f} | {other} |\n"
    )
