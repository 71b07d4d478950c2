"""What two processes observed becomes one grid, the same on both, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.ao.quantization import QConfig
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qat_lightning import prepare
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.qconfig import default_qconfig
from qat_lightning.run.distributed.merge_ranges import keep_out_of_ddp_broadcast, merge_ranges

WEIGHT = FakeQuantize.with_args(
    observer=PerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
)
EXTREMES, MEANS = (
    QConfig(
        activation=FakeQuantize.with_args(observer=observer, quant_min=0, quant_max=255, dtype=torch.quint8),
        weight=WEIGHT,
    )
    for observer in (MinMaxObserver, MovingAverageMinMaxObserver)
)
State = dict[str, Any]


class Line(nn.Module):
    """One linear layer of weight 1 to `width`, so that ranges are easy to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 3, bias=False))
        nn.init.constant_(next(self.body.parameters()), 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(
        {name: observe_and_merge(*inputs[rank]) for name, inputs in WORK.items()}, f"{folder}/{rank}.pt"
    )
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, State]]:
    """What two gloo processes ended with, by the name of the work."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_process, (str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def ranges(network: nn.Module) -> State:
    """Range, scale and zero point of each fake-quantize."""
    return {
        f"{name}.{key}": value.clone()
        for name, child in fake_quantizes(network)
        for key, value in child.named_buffers()
        if key.split(".")[-1] in ("min_val", "max_val", "scale", "zero_point")
    }


def observe_and_merge(qconfig: QConfig | None, inputs: list[float] | None) -> State:
    torch.manual_seed(0)
    prepared = prepare(Line(), qconfig=qconfig)
    if inputs is not None:
        prepared(torch.tensor([[value] for value in inputs]))
    merge_ranges(prepared)
    return ranges(prepared)


# For each work what the two ranks observe, with which qconfig.
WORK: dict[str, list[tuple[QConfig | None, list[float] | None]]] = {
    "extremes": [(EXTREMES, [-1.0, 2.0]), (EXTREMES, [-3.0, 0.5])],
    "means": [(MEANS, [-1.0, 2.0]), (MEANS, [-3.0, 0.5])],
    "default": [(None, [-1.0, 2.0]), (None, [-3.0, 0.5])],
    "rank 0 without data": [(MEANS, None), (MEANS, [-3.0, 0.5])],
    "rank 1 without data": [(MEANS, [-1.0, 2.0]), (MEANS, None)],
    "nobody": [(MEANS, None), (MEANS, None)],
}


def assert_equal(ranks: list[State]) -> None:
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name


INPUT = "activation_post_process_0.activation_post_process"


@pytest.mark.parametrize(
    ("work", "low", "high"),
    [
        ("extremes", -3.0, 2.0),
        ("means", -2.0, 1.25),
        ("default", -2.0, 1.25),
        ("rank 0 without data", -3.0, 0.5),
        ("rank 1 without data", -1.0, 2.0),
    ],
)
def test_merged_ranges(merged: list[dict[str, State]], work: str, low: float, high: float) -> None:
    ours, theirs = (rank[work] for rank in merged)
    assert_equal([ours, theirs])
    assert ours[f"{INPUT}.min_val"].item() == low
    assert ours[f"{INPUT}.max_val"].item() == high
    levels = 127 if work == "default" else 255
    assert ours["activation_post_process_0.scale"].item() == pytest.approx((high - low) / levels)
    assert ours["body.0.weight_fake_quant.activation_post_process.max_val"].tolist() == [1.0] * 3


def test_ranges_that_nobody_has_seen_stay_unseen(merged: list[dict[str, State]]) -> None:
    ours, theirs = (rank["nobody"] for rank in merged)
    assert_equal([ours, theirs])
    assert ours[f"{INPUT}.min_val"].item() == torch.inf
    assert ours[f"{INPUT}.max_val"].item() == -torch.inf


def test_one_process_has_nothing_to_merge() -> None:
    prepared = prepare(Line())
    prepared(torch.tensor([[1.0], [2.0]]))
    before = ranges(prepared)
    merge_ranges(prepared)
    assert all(torch.equal(value, before[name]) for name, value in ranges(prepared).items())


def test_what_ddp_ignores_already_stays_ignored() -> None:
    prepared: Any = prepare(Line())
    prepared._ddp_params_and_buffers_to_ignore = ["mine"]
    keep_out_of_ddp_broadcast(prepared)
    ignored = set(prepared._ddp_params_and_buffers_to_ignore)
    observers = {
        f"{name}.{buffer}" for name, child in fake_quantizes(prepared) for buffer, _ in child.named_buffers()
    }
    assert ignored == {"mine", *observers}
    assert f"{INPUT}.min_val" in ignored


def test_histograms_stay_in_the_broadcast() -> None:
    default = default_qconfig("onednn")
    histogram = default_qconfig("onednn", "histogram").activation
    prepared: Any = prepare(Line(), qconfig=QConfig(activation=histogram, weight=default.weight))
    keep_out_of_ddp_broadcast(prepared)
    ignored = prepared._ddp_params_and_buffers_to_ignore
    assert ignored
    assert not any(name.startswith(INPUT.split(".")[0]) for name in ignored)
    assert any("weight_fake_quant" in name for name in ignored)


@pytest.mark.slow
def test_a_distributed_run_ends_with_one_grid_and_one_int8_network(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ddp_script", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, env=environment, timeout=300)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert_equal([rank["ranges"] for rank in ranks])
    assert_equal([rank["weights"] for rank in ranks])
    assert torch.equal(ranks[0]["int8"], ranks[1]["int8"])
    assert ranks[0]["path"] == ranks[1]["path"] == str(tmp_path / "out" / "int8.pt")
    assert [path.name for path in tmp_path.rglob("int8*")] == ["int8.pt"]
    # Rank 0 saw images up to 4, rank 1 ones ten times as bright: the mean of the two is common.
    assert 10 < ranks[0]["ranges"][f"model.{INPUT}.max_val"].item() < 30
