"""Eager mode beyond finding what to fuse: what computes in float, lists of one's own, example inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import QuantizationAwareTraining, convert, load_int8, prepare, save_int8
from qat_lightning.base.sqnr import sqnr
from tests.networks import StubbedConvBnRelu, StubbedLayers, Unlisted, images, train_steps
from tests.runs import TinyModule, trainer
from tests.test_fusion import Traceable, Untraceable, agreement, groups_of


def test_a_list_and_a_fuse_model_of_ones_own_win() -> None:
    listed = prepare(Unlisted(), fuse=[["conv1", "bn1"]])
    assert groups_of(listed) == (("conv1", "bn1"),)
    assert groups_of(prepare(Traceable(), fuse=[])) == ()


def test_a_relu6_that_stays_is_not_fused() -> None:
    assert groups_of(prepare(StubbedConvBnRelu(nn.ReLU6))) == (("conv", "bn", "relu"),)
    assert groups_of(prepare(StubbedConvBnRelu(nn.ReLU6), replace_relu6=False)) == (("conv", "bn"),)


class ReadsWeights(StubbedConvBnRelu):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bn.weight.mean()


def test_a_module_whose_weight_is_read_is_not_replaced() -> None:
    assert groups_of(prepare(ReadsWeights())) == ()


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


class Loose(TinyModule):
    """The layers are on the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        del self.model
        for name, child in Untraceable().named_children():
            self.add_module(name, child)
        self.example_input_array = images(2)

    forward = Untraceable.forward  # type: ignore[assignment]


def test_a_module_that_is_the_network_itself(tmp_path: Path) -> None:
    module = Loose()
    trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1, enable_checkpointing=False).fit(module)
    assert len(groups_of(module)) == 3


def test_a_wrong_example_input_array(tmp_path: Path) -> None:
    runner = trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True)
    with pytest.raises(
        ValueError, match=r"copy of Flipped runs on its example_input_array, .*failed: .*fuse="
    ):
        runner.fit(Flipped(torch.randn(2, 1, 8, 8)))


def test_wrong_example_inputs() -> None:
    with pytest.raises(ValueError, match=r"Untraceable cannot be traced, and it does not run .*must be the"):
        prepare(Untraceable(), example_inputs=(torch.randn(2, 1, 8, 8),))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (
            [["conv1", "relu1", "bn1"]],
            {},
            r"\(Conv2d, ReLU6, BatchNorm2d\), but torch.ao cannot .* A group may be a Conv1d",
        ),
        ([["conv1"]], {}, r"\['conv1'\] \(Conv2d\), but a group has two or three modules. A group may be"),
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
