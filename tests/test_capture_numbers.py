"""Sizes flow through `len()` and `int()`, and are guarded where Python needs a plain number."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import GuardError, convert, export_onnx, load_runtime, prepare
from qat_lightning.fake_quant.phases import set_enabled


def padding(size: int, stride: int) -> int:
    """The padding of TensorFlow, as transformers' MobileNetV2 computes it."""
    length = int(size)
    return max(3 - stride, 0) if length % stride == 0 else max(3 - length % stride, 0)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator with a closure."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) * 2

    return call


class Base(nn.Module):
    """Convolution and linear layer; the subclasses compute with sizes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 2)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.between(x).mean((2, 3)))
        return y


class Padded(Base):
    """Pads by a helper that makes an int of the size."""

    def between(self, x: Tensor) -> Tensor:
        height, width = padding(x.shape[-2], 2), padding(x.shape[-1], 2)
        y: Tensor = self.conv(F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2]))
        return y


class Viewed(Base):
    """Reshapes by the length of its input, and cuts a number off."""

    def between(self, x: Tensor) -> Tensor:
        y = self.conv(x).reshape(len(x), 4, -1, 1)
        part: Tensor = y[:, :, : int(y.shape[2] / 2) + round(x.shape[3] / 4)] * divmod(x.shape[2], 5)[1]
        return part


class Decorated(Base):
    """Calls a decorated method, with a comprehension."""

    @doubled
    def between(self, x: Tensor) -> Tensor:
        batch, *sizes = [int(size) for size in x.shape[::2]]
        y: Tensor = self.conv(x)[:batch] / sizes[0]
        return y


class Sub(Decorated):
    """Calls the method of its base."""

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = super().between(x)
        return y


class Asking(Base):
    """Asks what is an int, in the function that makes one."""

    def between(self, x: Tensor) -> Tensor:
        assert "int" not in vars(sys.modules[__name__])
        assert "len" not in vars(sys.modules[__name__])
        size = x.shape[1]
        assert isinstance(size, int)
        assert type(int("3")) is int
        y: Tensor = self.conv(x) * int(size)
        return y


class Looking(Base):
    """Looks a size up, which takes a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = {12: 2.0, 16: 3.0}

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * self.factors[int(x.shape[2])]
        return y


def captured(network: nn.Module, example: Tensor) -> nn.Module:
    """The prepared network in eval mode, without rounding."""
    prepared = prepare(copy.deepcopy(network), example_inputs=example)
    set_enabled(prepared, observer=False, fake_quant=False)
    return prepared.eval()


@pytest.mark.parametrize("build", [Padded, Viewed, Decorated, Asking])
def test_other_sizes_of_the_same_path_work(build: type[Base]) -> None:
    network = build().eval()
    prepared = captured(network, torch.randn(2, 3, 12, 12))
    for shape in ((2, 3, 12, 12), (5, 3, 12, 12), (1, 3, 16, 14)):
        x = torch.randn(shape)
        torch.testing.assert_close(prepared(x), network(x))


def test_a_decision_by_a_size_is_guarded_by_its_outcome() -> None:
    network = Padded().eval()
    prepared = captured(network, torch.randn(2, 3, 12, 12))
    with pytest.raises(
        GuardError, match=r"decided by True.*False.*\n  at .*: return max.* if length % stride"
    ):
        prepared(torch.randn(2, 3, 13, 12))
    odd = torch.randn(3, 3, 15, 14)
    torch.testing.assert_close(captured(network, torch.randn(2, 3, 13, 12))(odd), network(odd))


@pytest.mark.parametrize("build", [Sub, Looking])
def test_a_plain_number_is_guarded(build: type[Base]) -> None:
    network = build().eval()
    prepared = captured(network, torch.randn(2, 3, 12, 12))
    x = torch.randn(2, 3, 12, 14)
    torch.testing.assert_close(prepared(x), network(x))
    with pytest.raises(GuardError, match=r"decided by 12\..*16.*\n  at .*int\(.*\n.*x\.shape\[0\]"):
        prepared(torch.randn(2, 3, 16, 12))


class Repeating(Base):
    """Repeats a list by the batch size, and loops over the batch."""

    def between(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.stack([y[i] + shift for i, shift in enumerate([1.0] * x.shape[0])])


class Looping(Base):
    """Loops over the batch."""

    def between(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.stack([y[i] for i in range(len(x))])


@pytest.mark.parametrize(
    ("build", "line"), [(Repeating, r"\* x\.shape\[0\]"), (Looping, r"range\(len\(x\)\)")]
)
def test_a_loop_over_the_batch_names_its_line_and_the_fix(build: type[Base], line: str) -> None:
    prepared = captured(build(), torch.randn(2, 3, 12, 12))
    prepared(torch.randn(2, 3, 16, 16))
    with pytest.raises(GuardError, match=rf"decided by 2\..*it is 3.*\n  at .*{line}.*\n.*x\.size\(0\)"):
        prepared(torch.randn(3, 3, 12, 12))


def test_a_size_that_flows_does_so_in_a_file(tmp_path: Any) -> None:
    prepared = prepare(Viewed(), example_inputs=torch.randn(2, 3, 12, 12))
    prepared(torch.randn(4, 3, 12, 12))
    prepared.eval()
    convert(prepared)
    runtime = load_runtime(export_onnx(prepared, tmp_path / "a.onnx", (torch.randn(2, 3, 12, 12),)))
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(runtime(x), prepared(x), rtol=0, atol=0.1)
