"""Each row of docs/compatibility.md, proved by a run; and the page itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compatibility import ROWS, Row, page

PAGE = Path(__file__).parents[1] / "docs/compatibility.md"


# One of each kind; `make test-all` proves every row.
FAST = (
    "model_checkpoint_top_k",
    "early_stopping",
    "ema_weight_averaging",
    "stochastic_weight_averaging",
    "evaluation_after_fit",
    "checkpoint_in_a_fresh_module",
    "precision_bf16_mixed",
    "manual_optimization",
    "compiled_network",
    "sharded",
    "csv_logger",
    "accumulate_grad_batches",
    "fast_dev_run",
    "lightning_cli",
    "learning_rate_finder",
    "backbone_finetuning",
    "pruning_during",
)
MARKED = [
    pytest.param(row, marks=[] if str(row) in FAST else [pytest.mark.slow], id=str(row)) for row in ROWS
]


@pytest.mark.parametrize("row", MARKED)
def test_row(row: Row, tmp_path: Path) -> None:
    row.proof(tmp_path)


def test_the_page_is_what_the_registry_says() -> None:
    assert PAGE.read_text() == page(), "python -m tests.compatibility > docs/compatibility.md"


def test_every_row_gives_a_verdict_and_has_a_proof_of_its_own() -> None:
    assert [row.feature for row in ROWS if not row.verdict.startswith(("works", "refused"))] == []
    names = [str(row) for row in ROWS]
    assert len(names) == len(set(names))
    assert all((PAGE.parent / row.file).is_file() for row in ROWS)
