"""ReLU6 becomes ReLU in both modes, whether a module or a call; what only looks like one stays."""

from __future__ import annotations

import copy
import dis
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision.models import quantization as quantizable

from qat_lightning import convert, load_int8, prepare, save_int8
from qat_lightning.base.sqnr import sqnr
from qat_lightning.modes.eager.relu6_calls import clamps_in
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


class Step(NamedTuple):
    """An instruction, as far as the search reads it."""

    opname: str
    argval: Any


@pytest.mark.parametrize("constant", ["LOAD_CONST", "LOAD_SMALL_INT"])  # up to Python 3.13, and since 3.14
def test_a_clamp_is_found_in_the_bytecode_of_every_python(constant: str) -> None:
    def steps(*bounds: float) -> list[Any]:
        call = [Step("LOAD_GLOBAL", "F"), Step("LOAD_ATTR", "hardtanh"), Step("LOAD_FAST_BORROW", "x")]
        return [
            *call,
            *(Step(constant, bound) for bound in bounds),
            Step("CALL", 3),
            Step("RETURN_VALUE", None),
        ]

    assert list(clamps_in(steps(0, 6))) == ["hardtanh"]
    assert list(clamps_in(steps(-1, 1))) == []
    later: Any = Step(constant, 6)
    assert list(clamps_in([*steps(-1, 1), later])) == []


def test_the_bytecode_of_this_python() -> None:
    def clamped(x: Tensor) -> Tensor:
        return F.hardtanh(x, 0, 6)

    assert list(clamps_in(dis.get_instructions(clamped))) == ["hardtanh"]
    assert not list(clamps_in(dis.get_instructions(lambda x: F.hardtanh(x, -1.0, 1.0))))
