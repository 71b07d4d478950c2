"""`untraceable="float"`: what cannot be traced stays float, and the rest is quantized."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qat_lightning import QuantizationAwareTraining, UntraceableError, convert, load_int8, prepare
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import CLASSES, ConvBnRelu, images, sqnr, train_steps
from tests.runs import TinyModule, trainer


class ByValue(nn.Module):
    """Its path depends on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x / 2
        return self.relu6(self.conv(x))


class Counting(nn.Module):
    """Advances a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


class Drawing(nn.Module):
    """Draws a random number in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-4 * random.random())


class Rerouted(nn.Module):
    """Calls a layer in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.inner(x)


class Mixed(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.stem = ConvBnRelu()
        self.parts = nn.Sequential(*parts)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.parts(self.stem(x)).mean((2, 3)))


PARTS: dict[str, type[nn.Module]] = {p.__name__: p for p in (ByValue, Counting, Drawing, Rerouted)}


@pytest.mark.parametrize("name", PARTS)
def test_the_smallest_untraceable_part_stays_float(name: str) -> None:
    network = Mixed(nn.Conv2d(8, 8, 1), nn.Sequential(nn.ReLU(), PARTS[name]()))
    if name != "Rerouted":  # whose layers stay float in any case, since it reads self.training
        with pytest.raises(UntraceableError):
            prepare(network)
    prepared = prepare(network, untraceable="float", backend="onednn")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("stem.conv", "parts.0", "fc")
    (kept,) = recipe.untraceable
    assert kept.startswith("parts.1.1 (")
    assert isinstance(prepared.get_submodule("parts.1.1"), PARTS[name])
    x = images()
    train_steps(prepared, ((x,), {}))
    set_enabled(prepared, observer=False, fake_quant=True)
    int8 = convert(prepared)
    assert isinstance(int8.get_submodule("parts.1.1"), PARTS[name])
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 30


def test_the_line_is_named() -> None:
    prepared = prepare(Mixed(ByValue(), ByValue()), untraceable="float")
    source, start = inspect.getsourcelines(ByValue)
    line = start + next(i for i, text in enumerate(source) if "if x.sum()" in text)
    where = f"test_untraceable.py:{line}: if x.sum() > 0:"
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.untraceable == (f"parts.0 ({where})", f"parts.1 ({where})")
    assert isinstance(prepared.get_submodule("parts.0.relu6"), nn.ReLU6)


def test_the_network_itself_at_fault_and_nothing_left() -> None:
    with pytest.raises(UntraceableError, match=rf"cannot trace ByValue(.|\n)*{__file__}:\d+: if x.sum"):
        prepare(ByValue(), untraceable="float")
    with pytest.raises(ValueError, match=r"Nothing is left to quantize.*traced \(0 \(test_untraceable\.py"):
        prepare(nn.Sequential(ByValue()), untraceable="float")
    with pytest.raises(ValueError, match=r"untraceable must be 'error', or 'float'.*received 'skip'"):
        prepare(Mixed(), untraceable="skip")


def test_traceable_networks_are_the_same_either_way() -> None:
    left, right = (recipe_of(prepare(Mixed(), untraceable=u)) for u in ("error", "float"))
    assert left == right


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize(
    "build",
    [lambda: torch.jit.script(Scripted()), lambda: torch.jit.trace(Scripted(), torch.randn(1, 8, 4, 4))],
    ids=["scripted", "traced"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_module_is_one_float_call(build: Any) -> None:
    network = Mixed(build())
    with pytest.raises(
        UntraceableError, match=r"TorchScript module(.|\n)*\.py:\d+(.|\n)*untraceable='float'"
    ):
        prepare(network)
    x = images()
    prepared = prepare(network, untraceable="float")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("stem.conv", "fc")
    assert recipe.untraceable[0].startswith("parts.0 (")
    assert prepared.get_submodule("parts.0") is network.parts[0]
    train_steps(prepared, ((x,), {}))
    with torch.no_grad():
        assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 20


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_module_without_weights_is_one_call() -> None:
    recipe = recipe_of(prepare(Mixed(torch.jit.script(nn.Sequential(nn.SiLU())))))
    assert recipe is not None
    assert not recipe.untraceable


class Loose(TinyModule):
    def __init__(self) -> None:
        super().__init__(ByValue())
        self.stem = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("build", [lambda: TinyModule(Mixed(ByValue())), Loose])
def test_in_a_trainer(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("qat_lightning.run.messages.rank_zero_info", said.append)
    qat = QuantizationAwareTraining(untraceable="float", output_dir=tmp_path)
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(build())
    assert "not traceable and float: " in said[0]
    assert "(test_untraceable.py:" in said[0]
    x = images()
    assert torch.equal(load_int8(tmp_path / "int8.pt", build())(x), qat.int8_module(x))  # type: ignore[misc]


class Gated(nn.Module):
    """Wraps a block so that it cannot be traced."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if bool(x.isfinite().all()) else x


def test_a_timm_network() -> None:
    network: Any = timm.create_model("resnet10t", num_classes=CLASSES)
    network.layer2 = Gated(network.layer2)
    prepared = prepare(network, untraceable="float", backend="onednn")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert [name.split()[0] for name in recipe.untraceable] == ["layer2"]
    assert not any(name.startswith("layer2") for name in recipe.layers)
    x = torch.randn(4, 3, 64, 64)
    train_steps(prepared, ((x,), {}))
    set_enabled(prepared, observer=False, fake_quant=True)
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 20
