from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.base.schedule import Moment, Phase, ResolvedSchedule, Schedule

points = st.none() | st.integers(0, 50) | st.floats(0, 1, exclude_max=True)
schedules = st.builds(Schedule, points, points, st.integers(0, 20))


@given(schedules, st.integers(1, 5000), st.integers(1, 40))
def test_phases_only_ever_go_forward(schedule: Schedule, total: int, per_epoch: int) -> None:
    resolved = schedule.resolve(total)
    phases = [resolved.phase(step // per_epoch, step) for step in range(min(total, 300))]
    for before, after in pairwise(phases):
        assert after.fake_quant >= before.fake_quant
        assert after.freeze_bn >= before.freeze_bn
        assert after.observe <= before.observe


@given(schedules, st.integers(1, 5000))
def test_the_first_step_is_always_observed(schedule: Schedule, total: int) -> None:
    assert schedule.resolve(total).phase(0, 0).observe


@given(schedules, st.integers(1, 5000))
def test_a_fraction_never_resolves_to_less_than_one_step(schedule: Schedule, total: int) -> None:
    resolved = schedule.resolve(total)
    for point, moment in (
        (schedule.freeze_bn_at, resolved.freeze_bn),
        (schedule.freeze_observers_at, resolved.freeze_observers),
    ):
        if isinstance(point, float):
            assert moment.epoch is None
            assert moment.step is not None
            assert 1 <= moment.step <= max(1, total)
        else:
            assert moment == Moment(epoch=point)


@given(schedules, st.integers(1, 5000))
def test_the_state_survives_json(schedule: Schedule, total: int) -> None:
    resolved = schedule.resolve(total)
    assert ResolvedSchedule.from_state_dict(json.loads(json.dumps(resolved.state_dict()))) == resolved


def test_half_of_the_run() -> None:
    resolved = Schedule(None, 0.5, 0).resolve(24)
    assert [resolved.phase(s // 6, s).observe for s in (0, 11, 12, 23)] == [True, True, False, False]
    assert not any(resolved.phase(3, s).freeze_bn for s in range(24))


def test_epochs() -> None:
    resolved = Schedule(freeze_bn_at=2, freeze_observers_at=3, fake_quant_from=1).resolve(math.inf)
    assert [resolved.phase(epoch, epoch * 6) for epoch in range(4)] == [
        Phase(fake_quant=False, observe=True, freeze_bn=False),
        Phase(fake_quant=True, observe=True, freeze_bn=False),
        Phase(fake_quant=True, observe=True, freeze_bn=True),
        Phase(fake_quant=True, observe=False, freeze_bn=True),
    ]


def test_freezing_at_once_still_observes_one_step() -> None:
    resolved = Schedule(freeze_bn_at=0, freeze_observers_at=0, fake_quant_from=0).resolve(10)
    assert resolved.phase(0, 0) == Phase(fake_quant=True, observe=True, freeze_bn=True)
    assert resolved.phase(0, 1) == Phase(fake_quant=True, observe=False, freeze_bn=True)


def test_what_a_run_does_not_reach() -> None:
    resolved = Schedule(freeze_bn_at=4, freeze_observers_at=3, fake_quant_from=4).resolve(math.inf)
    assert resolved.never_reached(epochs=4, steps=math.inf) == ["freeze_bn_at", "fake_quant_from"]
    assert resolved.never_reached(epochs=math.inf, steps=100) == []
    assert Schedule(None, 0.5, 0).resolve(100).never_reached(math.inf, 50) == ["freeze_observers_at"]


def test_a_fraction_of_an_endless_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs a run of known length.*max_steps.*freeze_bn_at=0\.25"):
        Schedule(0.25, None, 0).resolve(math.inf)
