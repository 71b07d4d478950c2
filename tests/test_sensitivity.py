from __future__ import annotations

import copy
import inspect
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig

from qat_lightning import Sensitivity, prepare, sensitivity
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.layers.layer_fake_quantizes import layer_fake_quantizes
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import CASES, Case, Residual, Stubbed, TwoInputs, images, leaves, same_state
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
from tests.runs import loader


@pytest.mark.parametrize("ruin", [ruin_weight, ruin_output])
@pytest.mark.parametrize("kind", [Row, StubbedRow])
def test_bad_layer_comes_first_both_ways(kind: type[Row], ruin: Callable[[Row], Row]) -> None:
    network = ruin(seeded(kind))
    found = sensitivity(network, data(network), mode="eager" if kind is StubbedRow else "fx")
    assert len(found.layers) == 4
    assert found.layers[0].name == "third.0"
    assert max(found.layers, key=lambda each: each.kept_sqnr).name == "third.0"
    assert found.layers[0].alone_sqnr < 15
    assert all(each.alone_sqnr > 30 for each in found.layers[1:])
    assert found.layers[0].kept_sqnr > 20
    assert found.layers[0].gain > 10
    assert found.int8_sqnr[""] < 15
    assert found.others_sqnr[""] > 30


def test_what_is_told_of_a_layer() -> None:
    network = seeded(Row)
    found = sensitivity(network, data(network))
    first = next(each for each in found.layers if each.name == "first.0")
    assert first.kind == "Conv2d+ReLU"
    assert first.macs == 8 * 10 * 10 * 3 * 9
    assert (found.float_metric, first.alone_metric) == (None, None)
    assert first.gain == pytest.approx(first.kept_sqnr - found.int8_sqnr[""])


def test_ratios_are_those_of_the_fake_quantizes() -> None:
    network = seeded(Row)
    batches = data(network, 8)
    found = sensitivity(network, batches, calibration_batches=1, samples=8)
    (x, expected), *_ = batches
    prepared = prepare(copy.deepcopy(network))
    prepared.eval()
    for _, grid in fake_quantizes(prepared):
        grid.train()
        grid.enable_fake_quant(False)
    prepared(x)
    for _, grid in fake_quantizes(prepared):
        grid.eval()
        grid.enable_fake_quant(True)
    noise = (prepared(x).detach() - expected).pow(2).mean()
    assert found.int8_sqnr[""] == pytest.approx(float(10 * torch.log10(expected.pow(2).mean() / noise)), 1e-3)


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_layers_have_their_grids(build: type[nn.Module]) -> None:
    prepared = prepare(build().train())
    grids = layer_fake_quantizes(prepared)
    assert all(len(own) == 2 for own in grids.values())
    assert len(frozenset().union(*grids.values())) == 2 * len(grids)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_nothing_is_changed(build: type[nn.Module], prepared: bool, training: bool) -> None:
    network = prepare(seeded(build).train()) if prepared else seeded(build)
    network.train(training)
    module = Judged(network)
    before = copy.deepcopy(module.state_dict())
    modes = [child.training for child in module.modules()]
    batches = [(x, torch.ones(8, 4)) for x, _ in loader(16)]
    states = torch.get_rng_state(), random.getstate()
    sensitivity(module, batches, metric="val_fidelity")
    assert same_state(module.state_dict(), before) == []
    assert [child.training for child in module.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert module._trainer is None


def test_trained_ranges_are_used() -> None:
    network = prepare(seeded(Row).train())
    narrow = copy.deepcopy(network)
    batches = loader(16)
    for x, _ in batches:
        network(x)
        narrow(0.1 * x)
    wide = sensitivity(network, batches).int8_sqnr[""]
    assert wide > 20
    assert sensitivity(narrow, batches).int8_sqnr[""] < 15


MARKED = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if str(case).startswith("encoder") else [])
    for case in CASES
]


@pytest.mark.parametrize("case", MARKED)
def test_every_kind_of_network(case: Case) -> None:
    network = seeded(case.build)
    args, kwargs = case.inputs()
    batch = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    found = sensitivity(network, [batch, batch], mode=case.mode)
    prepared = prepare(seeded(case.build), mode=case.mode, example_inputs=args)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert {each.name for each in found.layers} == set(recipe.layers)
    for each in found.layers[:-1]:
        fewer = recipe_of(prepare(seeded(case.build), mode=case.mode, keep_float=[each.name]))
        assert fewer is not None
        assert set(fewer.layers) == set(recipe.layers) - {each.name}


def test_own_qconfig() -> None:
    network = ruin_output(seeded(Row))
    with quiet_torch_ao():
        qconfig = get_default_qat_qconfig("x86")
    found = sensitivity(network, data(network), qconfig=qconfig)
    assert found.layers[0].name == "third.0"
    assert all(each.alone_sqnr > 30 for each in found.layers[1:])


class OwnLayers(Judged):
    """A LightningModule with layers of its own, and a network that only it calls."""

    def __init__(self) -> None:
        super().__init__(Row())
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.model(x)))


def test_layers_of_the_module_itself() -> None:
    module = seeded(OwnLayers)
    found = sensitivity(module, data(module), metric="val_fidelity")
    assert {each.name for each in found.layers} >= {"last", "model.third.0"}
    assert {each.network for each in found.layers} == {""}
    assert type(module) is OwnLayers


def test_two_networks() -> None:
    module = seeded(TwoNetworks)
    batches = data(module)
    found = sensitivity(module, batches, metric="val_fidelity")
    assert (found.layers[0].network, found.layers[0].name) == ("other", "third.0")
    assert found.int8_sqnr["other"] < 15 < 25 < found.int8_sqnr["model"]
    assert "other.third.0" in str(found.table().columns[0]._cells)


def test_two_inputs_and_nested_outputs() -> None:
    network = seeded(TwoInputs)
    batches = [{"x": images(8), "extra": torch.randn(8, 5), "labels": torch.zeros(8)} for _ in range(2)]
    found = sensitivity(network, batches, metric=lambda y, batch: float(len(leaves(y))))
    assert {each.name for each in found.layers} == {"image.0", "extra", "fc"}
    assert found.int8_metric == 3


@pytest.mark.parametrize("metric", [fidelity, "val_fidelity"])
def test_metric(metric: Any) -> None:
    network = ruin_output(seeded(Row))
    found = sensitivity(Judged(network), data(network), metric=metric)
    assert found.layers[0].name == "third.0"
    assert found.layers[0].network == "model"
    assert found.float_metric == pytest.approx(1, abs=1e-5)
    assert found.int8_metric is not None
    assert found.int8_metric < 0.8
    alone = [each.alone_metric for each in found.layers if each.alone_metric is not None]
    assert alone == sorted(alone)
    assert len(alone) == 4
    assert found.layers[0].kept_metric is not None
    assert found.layers[0].kept_metric > 0.9


def test_loss_as_metric() -> None:
    network = ruin_output(seeded(Row))
    found = sensitivity(
        network, data(network), metric=lambda y, batch: 1 - fidelity(y, batch), higher_is_better=False
    )
    assert found.layers[0].name == "third.0"


def test_table_plot_and_json(tmp_path: Path) -> None:
    network = ruin_output(seeded(Row))
    found = sensitivity(network, data(network), metric=fidelity)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert text.index("third.0") < text.index("first.0")
    assert "everything int8" in text
    values = json.loads(found.to_json())
    assert values["layers"][0]["name"] == "third.0"
    assert values["int8_sqnr"][""] == pytest.approx(found.int8_sqnr[""])
    for suffix, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        found.plot(tmp_path / f"plot.{suffix}")
        assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(start)
    assert b"<!-- metric -->" in (tmp_path / "plot.svg").read_bytes()
    replace(found, float_metric=None).plot(tmp_path / "plot.svg")
    assert b"<!-- metric -->" not in (tmp_path / "plot.svg").read_bytes()
    exact = Sensitivity(found.layers, {"": float("inf")}, {"": float("inf")})
    assert json.loads(exact.to_json())["int8_sqnr"] == {"": None}


def test_errors() -> None:
    network = seeded(Row)
    batches = data(network)
    with pytest.raises(ValueError, match="samples must be at least 1, but received 0"):
        sensitivity(network, batches, samples=0)
    with pytest.raises(ValueError, match="has no `validation_step`"):
        sensitivity(network, batches, metric="val_fidelity")
    with pytest.raises(TypeError, match="metric must be a function"):
        sensitivity(network, batches, metric=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logs \['val_fidelity'\]. Nearest: 'val_fidelity'"):
        sensitivity(Judged(network), batches, metric="val_fidel")
    with pytest.raises(ValueError, match="none of"):
        sensitivity(network, [])
    with pytest.raises(ValueError, match="NaN"):
        sensitivity(network, [torch.full((8, 3, 12, 12), torch.nan)])


def test_mobilenet() -> None:
    from torchvision.models import mobilenet_v3_small

    network = seeded(lambda: mobilenet_v3_small(num_classes=4)).train()
    for _ in range(20):  # until the batch-norms know what they see
        network(torch.randn(8, 3, 64, 64))
    found = sensitivity(network, [torch.randn(4, 3, 64, 64) for _ in range(2)], samples=4)
    assert len(found.layers) == 54
    assert all(each.macs > 0 for each in found.layers)
    assert all(each.alone_sqnr > found.int8_sqnr[""] for each in found.layers)
