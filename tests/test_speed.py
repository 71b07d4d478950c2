"""How speeds are measured, and what is said of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat_lightning.base import cpu
from qat_lightning.base.inputs import Inputs
from qat_lightning.report import machine
from qat_lightning.report.speed import LEAST_ROUNDS, MOST_ROUNDS, Candidate, measure, of_batch, pinned_threads

# Measuring


class Clock:
    """A clock that only the calls move on."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Candidate:
        """A candidate that takes `seconds`, call by call, and the last of them from then on."""
        left = list(seconds)

        def run(x: torch.Tensor) -> None:
            self.calls.append(f"{name}{len(x)}")
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Candidate(name, "fake", run)


def timed(clock: Clock, *groups: list[Candidate], seconds: float, batches: tuple[int, ...] = (1,)) -> Any:
    inputs = Inputs((torch.zeros(2, 3),), {})
    return measure(groups, inputs, batches=batches, threads=1, seconds=seconds, clock=clock)


def test_rounds_call_each_network_once() -> None:
    clock = Clock()
    timed(clock, [clock.call("a", 1), clock.call("b", 2)], [clock.call("c", 1)], seconds=0, batches=(1, 4))
    once = 1 + LEAST_ROUNDS  # to warm up
    assert clock.calls == ["a1", "b1"] * once + ["a4", "b4"] * once + ["c1"] * once + ["c4"] * once


def test_fast_networks_get_more_rounds_than_slow_ones() -> None:
    for seconds, rounds in ((1e-6, MOST_ROUNDS), (0.1, 10), (5.0, LEAST_ROUNDS)):
        clock = Clock()
        timed(clock, [clock.call("a", seconds * 1.001)], seconds=1)
        warm_up = 10 if seconds < 1e-3 else 1
        assert len(clock.calls) == warm_up + rounds


def test_medians_quartiles_and_ratios() -> None:
    clock = Clock()
    # A machine that is twice as slow in two rounds: the ratios do not know of it.
    base = clock.call("float", 9, 0.010, 0.010, 0.020, 0.020, 0.012)
    other = clock.call("int8", 9, 0.005, 0.005, 0.010, 0.010, 0.006)
    float_, int8 = timed(clock, [base, other], seconds=0)
    assert (float_.name, float_.batch, float_.runtime) == ("float", 1, "fake")
    assert float_.milliseconds == pytest.approx(12)
    assert float_.spread == pytest.approx((20 - 10) / 2)
    assert int8.milliseconds == pytest.approx(6)
    assert float_.speedup is None
    assert int8.speedup == pytest.approx(2)
    assert int8.per_second == pytest.approx(1000 / 6)


def test_threads_are_restored() -> None:
    before, seen = torch.get_num_threads(), []
    candidate = Candidate("a", "fake", lambda x: seen.append((torch.get_num_threads(), x.is_inference())))
    measure([[candidate]], Inputs((torch.zeros(1),), {}), batches=[2], threads=before + 1, seconds=0)
    assert set(seen) == {(before + 1, True)}
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="in between"), pinned_threads(before + 1):
        raise RuntimeError("in between")
    assert torch.get_num_threads() == before


def test_a_batch_repeats_the_first_sample() -> None:
    x, mask, scale = torch.arange(6.0).view(2, 3), torch.ones(5, 5), torch.tensor(2.0)
    given = Inputs(({"x": [x], "name": "a"}, mask), {"scale": scale, "extra": (x.int(), None)})
    args, kwargs = of_batch(given, 4)
    assert args[0]["x"][0].tolist() == [[0, 1, 2]] * 4
    assert args[0]["name"] == "a"
    assert args[1] is mask
    assert kwargs["scale"] is scale
    assert kwargs["extra"][0].tolist() == [[0, 1, 2]] * 4
    assert kwargs["extra"][1] is None


# The machine


INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R)
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8

processor\t: 1
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("said", "features", "vnni"),
    [
        (INTEL, ("avx2", "avx512f", "avx512_vnni", "amx_int8"), True),
        (INTEL.replace("avx512_vnni amx_int8", ""), ("avx2", "avx512f"), False),
        (ARM, ("asimddp", "i8mm", "sve"), True),
    ],
)
def test_what_linux_says_of_its_cpu(
    said: str, features: tuple[str, ...], vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(said)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    found = machine.describe(3)
    assert found.features == features
    assert machine.has_vnni(found) == vnni
    assert found.threads == 3
    assert (found.cpu == "Intel(R) Xeon(R)") == ("Intel" in said)
    assert found.cpu


def test_a_system_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = machine.describe(1)
    assert found.features == ("avx2",)
    assert found.cores >= 1
    assert found.cpu
