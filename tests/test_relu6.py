"""ReLU6 becomes ReLU in both modes, whether a module or a call; what only looks like one stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision.models import quantization as quantizable

from qat_lightning import convert, load_int8, prepare, save_int8
from qat_lightning.base.sqnr import sqnr
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import CLASSES, images, train_steps


def limit(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


class Spelled(nn.Module):
    """Clamps to 0…6 in four ways, and once to -1…1; its values are greater than 6."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        convs = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(4)]
        for conv in convs:
            nn.init.constant_(conv.weight, 0.5)
        self.convs = nn.ModuleList(convs)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Any:
        bounded = F.hardtanh(x)
        x = self.act(self.convs[0](self.quant(x)))
        x = F.relu6(self.convs[1](x))
        x = F.hardtanh(self.convs[2](x), 0, max_val=6.0)
        x = limit(self.convs[3](x))
        return self.dequant(x), bounded


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_every_spelling_becomes_a_relu(mode: str) -> None:
    x = images().abs() + 1
    network = Spelled()
    names = set(network.state_dict())
    clamped = copy.deepcopy(network)
    assert clamped(x)[0].max() == 6
    prepared = prepare(network, mode=mode)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.relu6 == 4
    features, bounded = prepared(x)
    assert features.max() > 100
    assert bounded.max() < 1.1
    assert names <= set(prepared.state_dict())
    assert prepare(clamped, mode=mode, replace_relu6=False)(x)[0].max() < 7


def test_eager_code_keeps_its_class_and_goes_the_whole_way(tmp_path: Path) -> None:
    x = images()
    prepared = prepare(Spelled())
    assert type(prepared).__name__ == "Spelled"
    assert isinstance(prepared, Spelled)
    train_steps(prepared, ((x,), {}))
    int8 = convert(copy.deepcopy(prepared))
    assert sqnr(prepared(x)[0], int8(x)[0]) > 30
    reloaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Spelled())
    assert torch.equal(reloaded(x)[0], int8(x)[0])


class Gate(nn.Module):
    """A hard sigmoid, and one of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.sum = nn.ReLU6(), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.sum.add_scalar(x, 3.0)) + self.act(self.sum.add_scalar(x, 3.0))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.conv = QuantStub(), DeQuantStub(), nn.Conv2d(3, 4, 3)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.dequant(F.relu6(self.conv(self.quant(x)))))


class GatedWithoutStubs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv(x))
        return F.relu6(x + 3) + self.act(input=3 + x)


@pytest.mark.parametrize("build", [Gated, GatedWithoutStubs])
def test_the_clamp_of_a_hard_sigmoid_stays(build: type[nn.Module]) -> None:
    prepared = prepare(build())
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.relu6 == 1
    assert prepared(100 * images()).max() < 13


def test_a_call_in_a_float_part_stays() -> None:
    class Whole(Spelled):
        def __init__(self) -> None:
            super().__init__()
            self.last = Clamp()

        def forward(self, x: Tensor) -> Any:
            return self.last(super().forward(x)[0])

    x = images().abs() + 1
    assert prepare(Whole(), keep_float=["last"])(x).max() == 6
    assert prepare(Whole())(x).max() > 100


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


def test_torchvisions_mobilenet_with_calls_equals_the_one_with_modules() -> None:
    with_modules = quantizable.mobilenet_v2(num_classes=CLASSES)
    with_calls = copy.deepcopy(with_modules)
    for network in (with_modules, with_calls):
        network.fuse_model = None
        for name, module in list(network.named_modules()):
            if type(module) is nn.ReLU:
                parent, _, leaf = name.rpartition(".")
                act = nn.ReLU6() if network is with_modules else Clamp()
                setattr(network.get_submodule(parent), leaf, act)
    x = torch.randn(2, 3, 32, 32)
    modules, calls = prepare(with_modules, fuse=[]).eval(), prepare(with_calls, fuse=[]).eval()
    assert recipe_of(modules).relu6 == recipe_of(calls).relu6 == 35  # type: ignore[union-attr]
    assert torch.equal(modules(x), calls(x))


class Listed(nn.Module):
    """Clamps in a comprehension, a lambda and a static method; three other things are named `relu6`."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(3))
        self.acts = nn.ModuleDict({"relu6": act})
        self.relu6 = act

    @staticmethod
    def clamp(x: Tensor) -> Tensor:
        return F.relu6(x)

    def forward(self, x: Tensor) -> Any:
        x = self.quant(x)
        bounded = lambda y: F.hardtanh(y, 0, 6)  # noqa: E731
        first, second, third = [F.relu6(conv(x)) for conv in self.convs]
        first = self.clamp(self.relu6(first))
        return self.dequant(first), self.dequant(bounded(second)), self.dequant(self.acts["relu6"](third))


@pytest.mark.parametrize(("act", "count"), [(nn.ReLU, 3), (nn.ReLU6, 5)])  # a module counts for each name
def test_clamps_are_found_in_the_functions_of_a_forward_and_names_are_not_clamps(
    act: Any, count: int
) -> None:
    prepared = prepare(Listed(act()))
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.relu6 == count
    assert all(y.max() > 10 for y in prepared(1000 * images()))


class Named(nn.Module):
    """Has a user-defined function and a method with the name of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.conv = QuantStub(), DeQuantStub(), nn.Conv2d(3, 4, 3)

    def hardtanh(self, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dequant(self.conv(self.quant(x)))
        return self.hardtanh(relu6(x), 0, 6)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def test_a_users_functions_with_torchs_names_are_the_users() -> None:
    recipe = recipe_of(prepare(Named()))
    assert recipe is not None
    assert recipe.relu6 == 0
