"""Eager mode finds what to fuse, and what is listed for it is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision import models

from qat_lightning import (
    QuantizationAwareTraining,
    UntraceableError,
    convert,
    load_int8,
    prepare,
    random_state,
    save_int8,
)
from qat_lightning.export.onnx import sqnr
from qat_lightning.modes import Options
from qat_lightning.modes.fusion import find_groups
from qat_lightning.recipe import recipe_of
from tests.networks import (
    CLASSES,
    StubbedConvBnRelu,
    StubbedLayers,
    Unlisted,
    images,
    same_state,
    train_steps,
)
from tests.runs import TinyModule, trainer

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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "googlenet"])
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


def test_watching_leaves_the_network_as_it_was() -> None:
    class Counting(Untraceable):
        counter = 0

        def forward(self, x: Tensor) -> Tensor:
            self.counter += 1
            return super().forward(F.dropout(x, 0.5) + np.random.rand())

    network, example = Counting(), images(2)
    network.fc.eval()
    before, given = copy.deepcopy(network.state_dict()), example.clone()
    modes = [module.training for module in network.modules()]
    state = random_state.capture()
    groups = find_groups(network, Options("x86", example_inputs=(example,)))
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
    assert "cannot trace Untraceable, so that this is unknown for ['norm']" in message
    assert "test_fusion.py:" in message
    assert "x.abs().max() > 1e6" in message
    assert groups_of(prepare(Untraceable(), keep_float=["norm"])) == IN_BLOCKS


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


class TwoReaders(StubbedConvBnRelu):
    """The batch-norm's output is added to what the ReLU makes of it."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.add, self.untraceable = FloatFunctional(), untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.sum() > 1e6:
            raise OverflowError
        x = self.bn(self.conv(self.quant(x)))
        return self.dequant(self.add.add(x, self.relu(x)))


class ReadInTraining(StubbedConvBnRelu):
    """The convolution's output is an auxiliary output, in training only."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Any:
        if self.untraceable and x.sum() > 1e6:
            raise OverflowError
        inner = self.bn(self.conv(self.quant(x)))
        y = self.dequant(self.relu(inner))
        return (y, self.dequant(inner)) if self.training else y


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("build", [TwoReaders, ReadInTraining])
def test_an_output_with_a_second_reader_is_not_fused(build: Any, untraceable: bool) -> None:
    x = images()
    prepared = prepare(build(untraceable), example_inputs=(x[:1],))
    assert groups_of(prepared) == (("conv", "bn"),)
    assert agreement(prepared, x) > 30


def test_a_float_part_is_neither_fused_nor_crossed() -> None:
    prepared = prepare(Traceable(), keep_float=["blocks.0", "norm"])
    assert groups_of(prepared) == IN_BLOCKS[1:]
    assert agreement(prepared, images()) > 30


def test_a_relu6_that_stays_is_not_fused() -> None:
    assert groups_of(prepare(StubbedConvBnRelu(nn.ReLU6))) == (("conv", "bn", "relu"),)
    assert groups_of(prepare(StubbedConvBnRelu(nn.ReLU6), replace_relu6=False)) == (("conv", "bn"),)


def test_a_module_with_a_hook_is_not_fused() -> None:
    network = StubbedConvBnRelu()
    network.bn.register_forward_hook(lambda *_: None)
    assert groups_of(prepare(network)) == ()


def test_a_list_and_a_fuse_model_of_ones_own_win() -> None:
    listed = prepare(Unlisted(), fuse=[["conv1", "bn1"]])
    assert groups_of(listed) == (("conv1", "bn1"),)
    assert groups_of(prepare(Traceable(), fuse=[])) == ()


ALONE: dict[str, Callable[[], list[nn.Module]]] = {
    "after a pool": lambda: [nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)],
    "with a ReLU": lambda: [nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)],
    "not affine": lambda: [nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 3)],
    "no statistics": lambda: [nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()],
    "of one dimension": lambda: [nn.MaxPool2d(10), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4)],
    "transposed": lambda: [nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
}


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
@pytest.mark.parametrize("layers", ALONE.values(), ids=ALONE)
def test_a_batch_norm_alone(layers: Callable[[], list[nn.Module]], backend: str) -> None:
    prepared = prepare(StubbedLayers(nn.Conv2d(3, 8, 3), *layers()), backend=backend)
    assert agreement(prepared, images()) > 30


def test_averages_keep_a_grid_of_their_own_between_int8_layers_only() -> None:
    class Pools(StubbedConvBnRelu):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between, self.after = (nn.AvgPool2d(2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.dequant(self.between(self.relu(self.bn(self.conv(self.quant(self.before(x)))))))
            return self.after(x)

    seen: dict[str, bool] = {}
    prepared = prepare(Pools())
    train_steps(prepared, ((images(),), {}), steps=6)
    int8 = convert(prepared)
    for name in ("before", "between", "after"):
        int8.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: seen.update({name: output.is_quantized})
        )
    int8(images())
    assert seen == {"before": False, "between": True, "after": False}


def test_a_file_needs_no_example_inputs_again(tmp_path: Path) -> None:
    x = images()
    prepared = prepare(Untraceable(), example_inputs=(x,))
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    assert torch.equal(load_int8(save_int8(int8, tmp_path / "int8.pt"), Untraceable())(x), int8(x))


class Flipped(TinyModule):
    """Gives its network other inputs than it gets itself."""

    def __init__(self, example: Any) -> None:
        super().__init__(Untraceable())
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flip(0)[..., :SMALL])


SMALL = 8


@pytest.mark.parametrize(
    "example", [images(2), (images(2),), {"x": images(2)}], ids=["tensor", "tuple", "dict"]
)
def test_the_callback_takes_the_example_input_array(tmp_path: Path, example: Any) -> None:
    module = Flipped(example)
    qat = QuantizationAwareTraining(backend="onednn")
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
    assert len(groups_of(module.model)) == 3
    assert qat.int8_module is not None
    x = images()
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 25


def test_a_wrong_example_input_array(tmp_path: Path) -> None:
    runner = trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True)
    with pytest.raises(
        ValueError, match=r"copy of Flipped runs on its example_input_array, .*failed: .*fuse="
    ):
        runner.fit(Flipped(torch.randn(2, 1, 8, 8)))


def test_wrong_example_inputs() -> None:
    with pytest.raises(TypeError, match=r"must be a tuple .*\(batch,\), but received Tensor"):
        prepare(Untraceable(), example_inputs=images())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Untraceable cannot be traced, and it does not run .*must be a tuple"
    ):
        prepare(Untraceable(), example_inputs=(torch.randn(2, 1, 8, 8),))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (
            [["conv1", "relu1", "bn1"]],
            {},
            r"\(Conv2d, ReLU6, BatchNorm2d\), but torch.ao cannot .* Possible are",
        ),
        ([["conv1"]], {}, r"\['conv1'\] \(Conv2d\), but a group has two or three modules. Possible"),
        ([[]], {}, r"the group \[\] \(no module\), but a group has two or three"),
        ([["conv1", "bn1"], ["bn1", "relu1"]], {}, "names the module 'bn1' twice"),
        (
            [["conv1", "bn1", "relu1"]],
            {"replace_relu6": False},
            r"ReLU6.*where it becomes a ReLU \(replace_relu6",
        ),
        ([["conv1", "bn1"]], {"keep_float": ["bn1"]}, "keep_float keeps 'bn1' float and not the others"),
        ([["conv1", "wide"]], {}, "8 output channels and the batch-norm 9"),
        ([["conv1", "flat"]], {}, r"\(Conv2d, BatchNorm1d\), but torch.ao cannot"),
        ([["turned", "bn1"]], {}, r"\(ConvTranspose2d, BatchNorm2d\), but torch.ao cannot"),
        ([["conv1", "plain"]], {}, "needs affine=True and track_running_stats=True"),
        ([["conv1", "bn1"], ["conv1_too", "bn2"]], {}, "'conv1_too', the same module as 'conv1' twice"),
    ],
)
def test_a_list_that_cannot_be_fused(groups: Any, options: dict[str, Any], message: str) -> None:
    network = Unlisted()
    network.wide, network.flat = nn.BatchNorm2d(9), nn.BatchNorm1d(8)
    network.plain, network.turned = nn.BatchNorm2d(8, affine=False), nn.ConvTranspose2d(8, 8, 3)
    network.conv1_too = network.conv1
    before = str(network)
    with pytest.raises(ValueError, match=message):
        prepare(network, mode="eager", fuse=groups, **options)
    assert str(network) == before
