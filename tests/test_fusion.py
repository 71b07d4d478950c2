"""Eager mode finds what to fuse, and what is listed for it is checked."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision import models

from qat_lightning import UntraceableError, convert, prepare
from qat_lightning.base import random_state
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.sqnr import sqnr
from qat_lightning.modes import Options
from qat_lightning.modes.eager.fusion import find_groups
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import (
    CLASSES,
    StubbedConvBnRelu,
    StubbedLayers,
    images,
    same_state,
    train_steps,
)

Groups = str | tuple[tuple[str, ...], ...]


def groups_of(network: nn.Module) -> Groups:
    recipe = recipe_of(network)
    assert recipe is not None
    return recipe.fuse


def agreement(prepared: nn.Module, x: Tensor) -> float:
    """How near int8 is to fake-quant after a few steps, in dB."""
    train_steps(prepared, ((x,), {}), steps=6)
    with torch.no_grad():
        return sqnr(prepared(x), convert(prepared)(x))


class Block(nn.Module):
    """A residual block whose parts run in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.bn, self.conv = (
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.add.add(x, self.relu(self.bn(self.conv(x))))


class Untraceable(nn.Module):
    """Its path depends on values, twice: outside of the blocks, and around a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.act, self.norm = nn.ReLU(), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e6:
            raise OverflowError
        x = self.act(self.norm(self.conv(self.quant(x))))
        for block in self.blocks:
            x = block(x)
        return self.dequant(self.fc(self.pool(x).flatten(1)))


IN_BLOCKS = tuple((f"blocks.{i}.conv", f"blocks.{i}.bn", f"blocks.{i}.relu") for i in (0, 1))


class Traceable(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.quant(x))))
        for block in self.blocks:
            x = block(x)
        return self.dequant(self.fc(self.pool(x).flatten(1)))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "mobilenet_v3_large", pytest.param("googlenet", marks=pytest.mark.slow)],
)
def test_what_is_found_in_torchvisions_models_is_what_they_list(name: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    listed = getattr(models.quantization, name)(num_classes=4, **options).eval()
    hidden = copy.deepcopy(listed)
    hidden.fuse_model = None
    listed, hidden = prepare(listed), prepare(hidden)
    assert groups_of(listed) == "auto"
    assert isinstance(groups_of(hidden), tuple)
    assert same_state(_without_recipe(listed), _without_recipe(hidden)) == []
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(listed(x), hidden(x))


def test_watching_finds_the_same_as_tracing() -> None:
    listed = models.quantization.resnet18(num_classes=4)
    blind = copy.deepcopy(listed)
    blind.fuse_model = None

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blind

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if bool(x.isfinite().all()) else x

    prepared = prepare(Blind(), example_inputs=(torch.randn(1, 3, 64, 64),))
    groups = groups_of(prepared)
    assert len(groups) == 20
    theirs, ours = prepare(listed), prepared.get_submodule("inner")
    assert same_state(_without_recipe(theirs), _without_recipe(ours)) == []


def _without_recipe(network: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("_qat")}


@pytest.mark.parametrize("build", [Traceable, Untraceable])
def test_a_network_that_runs_in_another_order_than_it_was_written(build: type[nn.Module]) -> None:
    x = images()
    prepared = prepare(build(), example_inputs=(x[:1],))
    assert groups_of(prepared) == (("conv", "norm", "act"), *IN_BLOCKS)
    assert agreement(prepared, x) > 30


class Counting(Traceable):
    counter = 0

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        return super().forward(F.dropout(x, 0.5) + torch.rand(1) + np.random.rand())


class CountingUntraceable(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() < 1e6 else -x)


@pytest.mark.parametrize("build", [Counting, CountingUntraceable])
def test_looking_leaves_the_network_as_it_was(build: type[Counting]) -> None:
    network, example = build(), images(2)
    network.fc.eval()
    before, given = copy.deepcopy(network.state_dict()), example.clone()
    modes = [module.training for module in network.modules()]
    state = random_state.capture()
    groups = find_groups(network, Options("x86", example_inputs=Inputs((example,), {})))
    assert len(groups) == 3
    assert str(random_state.capture()) == str(state)
    assert same_state(network, before) == []
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.counter == 0
    assert torch.equal(example, given)


def test_without_example_inputs_the_parts_that_can_be_traced_are_fused() -> None:
    network = Untraceable()
    network.norm = nn.Identity()  # type: ignore[assignment]
    assert groups_of(prepare(network)) == IN_BLOCKS
    with pytest.raises(UntraceableError) as caught:
        prepare(Untraceable())
    message = str(caught.value)
    assert "cannot trace Untraceable, so the layer is unknown for ['norm']" in message
    assert "test_fusion.py:" in message
    assert "x.abs().max() > 1e6" in message
    assert groups_of(prepare(Untraceable(), keep_float=["norm"])) == IN_BLOCKS


class UntraceableRow(StubbedLayers):
    """Calls its layers in a row, as a whole."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.sum() < 1e6 else -x)


class UntraceableFeatures(UntraceableRow):
    """Calls its layers one by one, and returns what each of them gives."""

    def forward(self, x: Tensor) -> Any:
        features = [self.quant(x if x.sum() < 1e6 else -x)]
        for layer in self.layers:
            features.append(layer(features[-1]))
        return [self.dequant(feature) for feature in features]


def test_layers_in_a_row_are_fused_if_nothing_looks_between_them() -> None:
    assert groups_of(prepare(UntraceableRow())) == (("layers.0", "layers.1", "layers.2"),)
    with pytest.raises(UntraceableError, match=r"unknown for \['layers.1'\]"):
        prepare(UntraceableFeatures())
    assert groups_of(prepare(UntraceableFeatures(), example_inputs=(images(1),))) == ()


def test_a_shared_module_is_not_fused() -> None:
    class Shared(StubbedConvBnRelu):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.relu(self.second(self.relu(self.bn(self.conv(self.quant(x)))))))

    class TwoNames(StubbedConvBnRelu):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.relu

    for build in (Shared, TwoNames):
        prepared = prepare(build())
        assert groups_of(prepared) == (("conv", "bn"),)
        assert agreement(prepared, images()) > 30


class MaybeUntraceable(StubbedConvBnRelu):
    """Cannot be traced where it is asked for."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.add, self.untraceable = FloatFunctional(), untraceable

    def normed(self, x: Tensor) -> Tensor:
        if self.untraceable and x.sum() > 1e6:
            raise OverflowError
        return self.bn(self.conv(self.quant(x)))


class TwoReaders(MaybeUntraceable):
    """The batch-norm's output is added to what the ReLU makes of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(x)
        return self.dequant(self.add.add(x, self.relu(x)))


class ReadInTraining(MaybeUntraceable):
    """The batch-norm's output is an auxiliary output, in training only."""

    def forward(self, x: Tensor) -> Any:
        inner = self.normed(x)
        y = self.dequant(self.relu(inner))
        return (y, self.dequant(inner)) if self.training else y


class KeptForLater(MaybeUntraceable):
    """The batch-norm's output stays behind as an attribute."""

    def forward(self, x: Tensor) -> Any:
        self.kept = [self.normed(x)]
        return self.dequant(self.relu(self.kept[0]))


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("build", [TwoReaders, ReadInTraining, KeptForLater])
def test_an_output_with_a_second_reader_is_not_fused(build: Any, untraceable: bool) -> None:
    x = images()
    prepared = prepare(build(untraceable), example_inputs=(x[:1],))
    assert groups_of(prepared) == (("conv", "bn"),)
    assert agreement(prepared, x) > 30


def test_a_float_part_is_neither_fused_nor_crossed() -> None:
    prepared = prepare(Traceable(), keep_float=["blocks.0", "norm"])
    assert groups_of(prepared) == IN_BLOCKS[1:]
    assert agreement(prepared, images()) > 30


def test_a_module_with_a_hook_is_not_fused() -> None:
    network = StubbedConvBnRelu()
    network.bn.register_forward_hook(lambda *_: None)
    assert groups_of(prepare(network)) == ()
