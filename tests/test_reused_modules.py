"""A module that is called several times computes the same as before after it is prepared, and in int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F

from qat_lightning import convert, prepare
from qat_lightning.fake_quant.phases import set_enabled
from tests.networks import layers_that_differ, train_steps


class Reused(nn.Module):
    """Calls one convolution three times. Subclasses say what follows each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.calls(x, x + 1, x - 1).mean((2, 3)))

    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError


class ReluAfterOne(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + self.conv(y) + self.conv(z)


class UnreadRelu(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        F.relu(self.conv(x), inplace=True)
        return self.conv(y) + self.conv(z)


class ReluAfterOneNorm(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + F.relu(self.norm(self.conv(y)))


class NormAfterOne(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(y)


class NormAfterOneAndAlone(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(y)


class EachItsRelu(Reused):
    def calls(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.first(self.conv(x)) + self.second(self.conv(y)) + F.relu(self.conv(z))


class Eager(Reused):
    """The first of these, with stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.sum = QuantStub(), DeQuantStub(), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.head(self.sum.add(self.first(self.conv(x)), self.conv(x)).mean((2, 3))))


KINDS = [ReluAfterOne, UnreadRelu, ReluAfterOneNorm, NormAfterOne, NormAfterOneAndAlone, EachItsRelu]


@pytest.mark.parametrize("kind", [*KINDS, Eager])
def test_fusing_changes_no_other_call(kind: type[Reused]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    nn.init.constant_(network.norm.running_mean, 0.3)  # type: ignore[arg-type]
    x = torch.randn(4, 3, 7, 7)
    expected = network(x)
    prepared = prepare(network.train()).eval()
    set_enabled(prepared, observer=True, fake_quant=False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_fake_quant(kind: type[Reused]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7, 7)
    prepared = prepare(kind().train())
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    with torch.no_grad():
        assert layers_that_differ(prepared.eval(), int8, x) == []
        torch.testing.assert_close(int8(x), prepared(x), rtol=0, atol=1e-6)


def test_the_same_after_each_call_is_fused() -> None:
    prepared = prepare(EachItsRelu().train())
    kinds = {type(module).__name__ for module in prepared.modules()}
    assert "ReLU" not in kinds
