"""Networks with a layer that int8 ruins, and how faithful they are then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.utils.data import DataLoader, TensorDataset

from tests.networks import images
from tests.runs import TinyModule


class Row(nn.Module):
    """Four layers, of which `third` can be made one that int8 ruins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fourth = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fourth(self.third(self.second(self.first(x))))


class StubbedRow(Row):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


def conv(network: nn.Module, name: str) -> nn.Conv2d:
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return layer


def ruin_weight(network: Row) -> Row:
    """Gives the third layer's weight a column that takes the whole grid, for a channel that is always 0."""
    with torch.no_grad():
        conv(network, "second.0").weight[0] = 0
        conv(network, "second.0").get_parameter("bias")[0] = -1
        conv(network, "third.0").weight[:, 0] = 300
    return network


def ruin_output(network: Row) -> Row:
    """Gives the third layer's output a channel that takes the whole grid, and that nobody reads."""
    with torch.no_grad():
        conv(network, "third.0").get_parameter("bias")[0] = 3000
        conv(network, "fourth").weight[:, 0] = 0
    return network


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def data(network: nn.Module, count: int = 32) -> DataLoader[Any]:
    """Images, and what the float network makes of them."""
    torch.manual_seed(1)
    x = images(count)
    with torch.no_grad():
        return DataLoader(TensorDataset(x, network(x)), batch_size=8)


def fidelity(outputs: Tensor, batch: Any) -> float:
    """1 where the outputs are the float ones."""
    return 1 - float((outputs - batch[1]).norm() / batch[1].norm())


class Judged(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_fidelity", fidelity(self(batch[0]), batch))


class TwoNetworks(Judged):
    """Two networks whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__(Row())
        self.other = ruin_output(Row())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.other(x)
