from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from qat_lightning import TargetError, keep_for_target, prepare
from qat_lightning.analysis.keep_for_target import fewest, needed, points_per_unit
from tests.networks import same_state
from tests.ruined import (
    Judged,
    Row,
    StubbedRow,
    TwoNetworks,
    data,
    fidelity,
    ruin_output,
    ruin_weight,
    seeded,
)


@pytest.mark.parametrize("kind", [Row, StubbedRow])
def test_target_keeps_exactly_the_bad_layer(kind: type[Row], caplog: pytest.LogCaptureFixture) -> None:
    network = ruin_weight(seeded(kind))
    before = copy.deepcopy(network.state_dict())
    with caplog.at_level(logging.INFO):
        names = keep_for_target(network, data(network), fidelity, max_drop=8)
    assert names == ("third.0",)
    assert same_state(network, before) == []
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Target")]
    assert "with third.0 float it is 0.9" in line


def test_target_keeps_the_reader_of_a_bad_output_too() -> None:
    """The grid of an output that an int8 layer reads is there even if the layer that made it is float."""
    network = ruin_output(seeded(Row))
    names = keep_for_target(Judged(network), data(network), "val_fidelity", max_drop=8)
    assert sorted(names) == ["fourth", "third.0"]


def test_good_network_keeps_nothing() -> None:
    network = seeded(Row)
    assert keep_for_target(network, data(network), fidelity, max_drop=8) == ()


def test_target_that_cannot_be_reached() -> None:
    network = ruin_weight(seeded(Row))
    message = r"at most 8 points.* is 1 in float and 0\..*Even with 0 of 4 layers float"
    with pytest.raises(TargetError, match=message):
        keep_for_target(network, data(network), fidelity, max_drop=8, max_layers=0)
    with pytest.raises(TargetError, match="Even with 3 of 4 layers float"):
        keep_for_target(network, data(network), fidelity, max_drop=0)


def test_search() -> None:
    ranked = list("abcdefghij")
    for size in range(11):
        asked: list[Any] = []

        def reaches(names: Any, size: int = size, asked: list[Any] = asked) -> bool:
            asked.append(list(names))
            return len(asked[-1]) >= size

        assert fewest(ranked, reaches) == size
        assert len(asked) <= 9
    assert fewest(ranked, lambda names: False) is None
    for wanted in ("c", "aj", "bcg", ""):
        assert needed((), ranked, set(wanted).issubset) == tuple(wanted)


def test_names_hold_for_all_networks() -> None:
    module = seeded(TwoNetworks)
    names = keep_for_target(module, data(module), "val_fidelity", max_drop=8)
    assert sorted(names) == ["fourth", "third.0"]


def test_errors() -> None:
    network = seeded(Row)
    batches = data(network)
    with pytest.raises(ValueError, match="at least 0 points"):
        keep_for_target(network, batches, fidelity, max_drop=-1)
    with pytest.raises(ValueError, match="is prepared already"):
        keep_for_target(prepare(seeded(Row).train()), batches, fidelity)


@pytest.mark.parametrize(
    ("value", "sign", "points"),
    [(0.9, 1, 100), (1.0, 1, 100), (0.2, -1, 100), (-0.3, 1, 100), (90.0, 1, 1), (100.0, 1, 1)],
)
def test_the_unit_of_a_metric_is_recognised(value: float, sign: int, points: int) -> None:
    assert points_per_unit(value, "val_accuracy", sign) == points


@pytest.mark.parametrize(("value", "sign"), [(2.3, -1), (101.0, 1), (-1.1, 1), (float("nan"), 1)])
def test_a_metric_without_percentage_points_is_refused(value: float, sign: int) -> None:
    with pytest.raises(ValueError, match=r"'val_loss' is .* for the float network\. Name an accuracy"):
        points_per_unit(value, "val_loss", sign)


def test_a_percentage_is_measured_in_its_own_points() -> None:
    network = ruin_weight(seeded(Row))
    share = keep_for_target(network, data(network), fidelity, max_drop=8)
    percentage = keep_for_target(
        network, data(network), lambda y, batch: 100 * fidelity(y, batch), max_drop=8
    )
    assert percentage == share == ("third.0",)
