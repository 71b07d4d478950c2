"""What a trace records is rewritten so that int8 computes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import convert, prepare
from qat_lightning.base.sqnr import sqnr
from tests.networks import images, train_steps


class Net(nn.Module):
    last: nn.Module
    up: nn.Module
    same: nn.Module

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.bias = nn.Parameter(torch.randn(8))
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def pad_to_even(x: Tensor) -> Tensor:
    height = math.ceil(x.shape[2] / 2) * 2
    return F.pad(x, (0, 0, 0, height - x.shape[2]))


def overwritten(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.relu(y)
    return net.last(y + torch.sigmoid(z))


def with_numbers(net: Net, x: Tensor) -> Tensor:
    return net.last((net.conv(x) + 1) * 0.37)


def fixed_grid_in_cat(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.last(torch.cat([torch.sigmoid(y), y], 1))


def called_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.last(4 * net.last(y))


def keywords(net: Net, x: Tensor) -> Tensor:
    return net.last(F.conv2d(net.conv(x), net.weight, padding=1))


def computed_bias(net: Net, x: Tensor) -> Tensor:
    return net.last(F.conv2d(net.conv(x), net.weight, torch.cat([net.bias[:4], net.bias[4:]]), padding=1))


def sizes_in_a_function(net: Net, x: Tensor) -> Tensor:
    return net.last(pad_to_even(net.conv(x)))


def asks_the_device(net: Net, x: Tensor) -> Tensor:
    offset = torch.ones(1).to(device=net.conv.weight.device, dtype=net.conv.weight.dtype)
    return net.last(net.conv(x) + offset)


def constant(net: Net, x: Tensor) -> Tensor:
    return net.last(net.conv(x) + torch.tensor([0.5]))


def up(net: Net, x: Tensor) -> Tensor:
    return net.last(net.up(net.conv(x)))


def same(net: Net, x: Tensor) -> Tensor:
    return net.last(net.same(net.conv(x)))


CASES: dict[Callable[[Net, Tensor], Tensor], dict[str, Callable[[], nn.Module]]] = {
    overwritten: {},
    with_numbers: {},
    fixed_grid_in_cat: {"last": lambda: nn.Conv2d(16, 8, 1)},
    called_twice: {},
    keywords: {},
    computed_bias: {},
    sizes_in_a_function: {},
    asks_the_device: {},
    constant: {},
    up: {"up": lambda: nn.ConvTranspose2d(8, 8, 2, 2)},
    same: {"same": lambda: nn.Conv2d(8, 8, (3, 5), padding="same")},
}


@pytest.mark.parametrize("forward", CASES, ids=lambda forward: forward.__name__)
def test_int8_follows_what_was_trained(forward: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    modules = {"last": lambda: nn.Conv2d(8, 8, 1), **CASES[forward]}
    network = Net(forward, **{name: make() for name, make in modules.items()})
    x = images(4, 9)
    prepared = prepare(network, backend="qnnpack")  # adds in 32 bits, on every CPU
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 33


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_uneven_same_padding_stays_float() -> None:
    network = Net(same, same=nn.Conv2d(8, 8, 2, padding="same"), last=nn.Conv2d(8, 8, 1))
    prepared = prepare(network)
    train_steps(prepared, ((images(4),), {}))
    int8 = convert(prepared)
    assert type(int8.get_submodule("same")) is nn.Conv2d
    with torch.no_grad():
        x = images(4)
        assert sqnr(prepared(x), int8(x)) > 33


def test_a_network_that_computes_its_padding() -> None:
    network = timm.create_model("tf_mobilenetv3_small_minimal_100", pretrained=False)
    prepared = prepare(network)
    x = images(2, 64)
    train_steps(prepared, ((x,), {}), steps=1)
    assert convert(prepared)(x).shape == (2, 1000)
