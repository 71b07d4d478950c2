"""Layers, norms and weights in forms that torch.ao does not know, each held to its right numbers.

A fake-quantized network in eval mode and its int8 form agree, as does what `load_int8` makes of its file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
import typing_extensions
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from qat_lightning import (
    convert,
    export_onnx,
    export_openvino,
    load_int8,
    load_qat_checkpoint,
    preflight,
    prepare,
    save_int8,
)
from qat_lightning.base.errors import PreflightError
from qat_lightning.export.load import load_graph
from qat_lightning.fake_quant.phases import freeze_bn_statistics, set_enabled
from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.lines import is_user_file
from qat_lightning.modes.lowering.int8.edges import Dequantize
from qat_lightning.modes.lowering.int8.paddings import PadValues
from qat_lightning.modes.trace.fixed_norms import FixedNorm, recognize_fixed_norms
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.floating import is_int8
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import sqnr, train_steps

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Stubbed(nn.Sequential):
    """Layers between stubs, for eager mode."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(QuantStub(), *layers, DeQuantStub())


def check(build: Callable[[], nn.Module], x: Tensor, path: Path, min_sqnr: float = 25) -> tuple[Any, Any]:
    """Trains, converts, saves and loads a network, compares its forms, and returns the first two.

    Args:
        build: Makes the float network.
        x: Its input.
        path: A folder for the int8 file.
        min_sqnr: How near fake-quant must be to float, in dB.
    """
    torch.manual_seed(0)
    prepared = prepare(build())
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    torch.manual_seed(1)  # the network that the file is loaded into has other weights
    loaded = load_int8(save_int8(int8, path / "int8.pt"), build())
    with torch.no_grad():
        expected, found = prepared(x), int8(x)
        step = (expected - found).abs().max()
        assert (expected != found).sum() <= found.numel() // 1000, f"they differ by up to {step}"
        assert torch.equal(loaded(x), found)
        set_enabled(prepared, observer=False, fake_quant=False)
        assert sqnr(prepared(x), expected) > min_sqnr
    set_enabled(prepared, observer=False, fake_quant=True)
    return prepared, int8


def weight_normed() -> nn.Sequential:
    """A network with torch's old weight norm, which has run."""
    network = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 2, 1))
    network(torch.randn(2, 4, 16))
    return network


def test_a_copy_of_an_old_weight_norm_computes_its_weight_anew() -> None:
    network, x = weight_normed(), torch.randn(2, 4, 16)
    copied: Any = copy_of(network)
    assert torch.equal(copied(x), network(x))
    nn.init.zeros_(copied[0].weight_g)
    assert not copied[0](x).sub(copied[0].bias.view(1, -1, 1)).any()
    assert network[0](x).any()


def test_the_advice_for_an_old_weight_norm_works() -> None:
    network, x = weight_normed(), torch.randn(2, 4, 16)
    advice = r"remove_weight_norm\(module\)"
    with pytest.raises(ValueError, match=advice):
        prepare(network)
    with pytest.raises(PreflightError, match=advice):
        preflight(network, x)
    nn.utils.remove_weight_norm(network[0])
    prepare(network)


def test_the_advice_for_a_weight_that_is_no_parameter_works() -> None:
    network: Any = weight_normed()
    network[0]._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match=r"module.weight = torch.nn.Parameter\(weight\)"):
        prepare(network)
    weight = network[0].weight.detach()
    del network[0].weight
    network[0].weight = nn.Parameter(weight)
    prepare(network)


def test_the_advice_for_an_old_spectral_norm_works() -> None:
    network = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU())
    with pytest.raises(ValueError, match=r"remove_spectral_norm\(module\)"):
        prepare(network)
    nn.utils.remove_spectral_norm(network[0])
    prepare(network)


_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def padded(mode: str, dims: int = 2, padding: Any = 1, kernel: Any = 3, *, kind: Any = nn.Sequential) -> Any:
    """Two convolutions that pad with values of their own, the first with a batch-norm."""
    conv, norm = _CONVS[dims], {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    return kind(
        *(conv(3, 8, kernel, padding=padding, padding_mode=mode), norm(8), nn.ReLU()),
        *(conv(8, 6, 3, 1, 2, 2, 2, padding_mode=mode), conv(6, 4, 1)),
    )


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_that_pads_with_values_is_int8(mode: str, dims: int, tmp_path: Path) -> None:
    x = torch.randn(8, 3, *[6] * dims)
    prepared, int8 = check(lambda: padded(mode, dims), x, tmp_path)
    assert sum(hasattr(module, "weight_fake_quant") for module in prepared.modules()) == 3
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(PadValues) == 2
    assert kinds.count(Dequantize) == 1  # the output alone: the paddings run on bytes


@pytest.mark.parametrize(("padding", "kernel"), [((1, 2), 3), ("same", (3, 4)), ("valid", 3)])
def test_each_form_of_padding(padding: Any, kernel: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 7, 7)
    torch.manual_seed(0)
    network = padded("circular", 2, padding, kernel).eval()
    prepared = prepare(network).eval()
    set_enabled(prepared, observer=False, fake_quant=False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), network(x))
    check(lambda: padded("circular", 2, padding, kernel), x, tmp_path)


def test_a_padded_convolution_can_be_kept_float() -> None:
    prepared: Any = prepare(padded("circular"), keep_float=["0"])
    first = next(node for node in prepared.graph.nodes if node.op != "placeholder")
    assert first.target is pad_values
    assert not hasattr(prepared.get_submodule("0"), "weight_fake_quant")


@pytest.mark.parametrize("mode", ["circular", pytest.param("replicate", marks=pytest.mark.slow)])
def test_paddings_are_exported_as_int8(mode: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(padded(mode))
    train_steps(prepared, ((x,), {}))
    for path in (
        export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=40),
        export_openvino(prepared, tmp_path / "int8.xml", (x,), min_sqnr=30),
    ):
        assert not load_graph(path).float_operations()


@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_such_a_convolution_stays_float_in_eager_mode(mode: str, tmp_path: Path) -> None:
    _, int8 = check(lambda: padded(mode, kind=Stubbed), torch.randn(8, 3, 6, 6), tmp_path)
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(quantized.Conv2d) == 1
    assert preflight(padded(mode, kind=Stubbed), torch.randn(2, 3, 6, 6))


def test_a_wrapper_of_pytorch_is_no_line_of_the_users() -> None:
    assert not is_user_file(typing_extensions.__file__)


def normed(norm: Callable[[], nn.Module], *, kind: Any = nn.Sequential) -> Any:
    """A norm or an activation between two convolutions."""
    return kind(nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 4, 1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "without factors": lambda: nn.BatchNorm2d(8, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "without both": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(8),
    "instance with statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 8),
    "PReLU": lambda: nn.PReLU(8),
    "ELU": nn.ELU,
    "LeakyReLU": nn.LeakyReLU,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", [nn.Sequential, Stubbed])
def test_int8_computes_what_a_norm_or_an_activation_does(name: str, kind: Any, tmp_path: Path) -> None:
    def build() -> Any:
        network = normed(NORMS[name], kind=kind)
        for module in network:
            if isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, -0.5, 0.9)
        return network

    check(build, torch.randn(8, 3, 8, 8), tmp_path)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_norm_without_factors_is_fused_and_gets_none(dims: int, tmp_path: Path) -> None:
    norm: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]

    def build() -> nn.Module:
        return nn.Sequential(_CONVS[dims](3, 8, 3), norm(8, affine=False), nn.ReLU(), _CONVS[dims](8, 4, 1))

    prepared, int8 = check(build, torch.randn(8, 3, *[6] * dims), tmp_path)
    fused: Any = prepared.get_submodule("0")
    assert type(fused).__name__ == f"ConvBn{dims}d"
    assert fused.relu
    assert [name for name, _ in fused.named_parameters()] == ["weight", "bias"]
    assert not {"0.bn.weight", "0.bn.bias"} & set(prepared.state_dict())
    assert not any(isinstance(module, norm) for module in int8.modules())


@pytest.mark.parametrize("norm", [NORMS["without factors"], lambda: FrozenBatchNorm2d(8)])
def test_torch_aos_own_modules_train_such_batch_norms(norm: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    prepared = prepare(normed(norm), qconfig="torch")
    train_steps(prepared, ((x,), {}))
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30
    assert all(
        parameter.grad is not None for name, parameter in prepared.named_parameters() if "bn" not in name
    )


def test_a_batch_norm_without_factors_that_stands_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 4, 1))

    check(build, torch.randn(8, 3, 8, 8), tmp_path)


class Detectors(nn.Module):
    """A frozen batch-norm as detectors write it, with an epsilon of its own."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class Squared(Detectors):
    """Looks like one, and computes something else with buffers that are not fresh."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.reshape(1, -1, 1, 1)


def test_only_what_computes_a_batch_norm_is_taken_for_one() -> None:
    network = nn.ModuleList([FrozenBatchNorm2d(4), Detectors(4), Squared(4), nn.BatchNorm2d(4)])
    recognize_fixed_norms(network)
    kinds = [type(module) for module in network]
    assert kinds == [FixedNorm, FixedNorm, Squared, nn.BatchNorm2d]


def frozen(norm: Any, trained: bool = False) -> Any:
    """Convolutions with frozen batch-norms; in the trained network the channels' variances differ a lot."""
    layers = [nn.Conv2d(3, 16, 3), norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3), norm(16), nn.ReLU()]
    network: Any = nn.Sequential(*layers, nn.MaxPool2d(2), norm(16), nn.Conv2d(16, 4, 1))
    for conv, bn in ((network[0], network[1]), (network[3], network[4])) if trained else ():
        size = torch.logspace(-1.5, 0, 16)
        deviation = size * conv.weight.detach().flatten(1).norm(dim=1)
        conv.weight.data.mul_(size.view(-1, 1, 1, 1))
        bn.running_var.copy_(deviation.square())
        bn.bias.normal_(0, 0.3)
    return network


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, Detectors])
def test_a_frozen_batch_norm_is_fused_and_stays_frozen(norm: Any) -> None:
    torch.manual_seed(0)
    x, network = torch.randn(8, 3, 16, 16), frozen(norm, trained=True)
    expected = network(x).detach()
    state = {name: value.clone() for name, value in network.named_buffers()}
    prepared: Any = prepare(network)
    assert [type(prepared.get_submodule(name)).__name__ for name in "03"] == ["ConvBn2d"] * 2
    assert all(prepared.get_submodule(name).relu for name in "03")
    assert {name.split(".")[-1] for name, _ in prepared.named_parameters()} == {"weight", "bias"}
    assert not [name for name, _ in prepared.named_parameters() if "bn" in name or name.startswith("7")]
    for training in (True, False):
        prepared.train(training)
        set_enabled(prepared, observer=False, fake_quant=False)
        torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-4)
    set_enabled(prepared, observer=True, fake_quant=True)
    freeze_bn_statistics(prepared, frozen=True)
    freeze_bn_statistics(prepared, frozen=False)
    train_steps(prepared, ((x,), {}))
    for name, value in state.items():
        inside = {"1": "0.bn", "4": "3.bn", "7": "7"}[name[0]]
        assert torch.equal(prepared.state_dict()[f"{inside}{name[1:]}"], value)


def prepare_and_observe(network: nn.Module, x: Tensor) -> nn.Module:
    prepared = prepare(network).train()
    for _ in range(3):
        prepared(x)
    return prepared.eval()


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, Detectors, Squared])
def test_the_file_of_a_network_with_frozen_batch_norms_fits_a_fresh_one(norm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    network = frozen(norm, trained=True)
    expected = network(x).detach()
    prepared = prepare_and_observe(network, x)
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), frozen(norm))
    with torch.no_grad():
        assert torch.equal(loaded(x), int8(x))
        assert (prepared(x) != int8(x)).float().mean() < 1e-3
        assert norm is Squared or sqnr(expected, prepared(x)) > 28
    assert not [name for name in int8.state_dict() if "tensor_constant" in name] or norm is Squared


@pytest.mark.parametrize("keep", ["0", "1", "7", FrozenBatchNorm2d])
def test_frozen_batch_norms_and_their_layers_can_be_kept_float(keep: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    prepared = prepare(frozen(FrozenBatchNorm2d, trained=True), keep_float=[keep])
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), frozen(FrozenBatchNorm2d))
    with torch.no_grad():
        assert (prepared(x) != int8(x)).float().mean() < 1e-3
        assert torch.equal(loaded(x), int8(x))


def test_a_frozen_batch_norm_is_exported_inside_its_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    network = nn.Sequential(*frozen(FrozenBatchNorm2d, trained=True)[:6], nn.Conv2d(16, 4, 1))
    path = export_onnx(prepare_and_observe(network, x), tmp_path / "int8.onnx", (x,), min_sqnr=40)
    assert not load_graph(path).float_operations()


def test_weights_of_an_ordinary_batch_norm_load_into_a_frozen_one() -> None:
    network = frozen(FrozenBatchNorm2d)
    recognize_fixed_norms(network)
    network.load_state_dict(frozen(nn.BatchNorm2d).state_dict())


class Inner(nn.Module):
    """Holds a weight in a module that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class Weights(nn.Module):
    """Layers and loose parameters. Subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8) / 3), nn.Parameter(torch.randn(4))
        self.kernel, self.norm = nn.Parameter(torch.randn(8, 4, 3, 3) / 6), nn.BatchNorm2d(8)
        self.blur: Tensor
        self.register_buffer("blur", torch.rand(8, 1, 3, 3) / 9)
        self.inner = Inner()

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))

    def pooled(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


class LinearCall(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.pooled(x), self.weight, self.bias)


class ConvCall(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(F.conv2d(self.features(x), self.kernel, padding=1, groups=2)))


class BufferCall(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.features(x), self.blur, None, 1, "same", 1, 8)


class InnerCall(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.pooled(x))


class SeveralCalls(Weights):
    """Twice the same, and once with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.pooled(x)
        same = F.linear(y, self.weight) + F.linear(self.last(y), self.weight)
        return same + F.linear(y, self.weight, self.bias)


class Tied(Weights):
    """Calls a layer, and the function with the layer's weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.last(self.pooled(x)), self.last.weight)


class Read(Weights):
    """Uses a loose weight, and reads it."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(self.pooled(x), self.weight), self.weight.abs().mean()


class ComputedLinear(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.pooled(x), self.weight.flip(0), self.bias)


class ComputedConv(Weights):
    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel - self.kernel.mean((1, 2, 3), keepdim=True)
        return torch.relu(F.conv2d(self.features(x), kernel, None, (2, 1), 1, 1, 2))


class ComputedConv1d(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.features(x).flatten(2), self.kernel.mean(3), None, 2, 1, 2, 2)


class BiasOfFused(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.pooled(x))) + self.last.bias


class BiasOfPlain(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pooled(x)) + self.last.bias


class Penalty(Weights):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.pooled(x)), self.last.weight.square().mean() + self.conv.weight.abs().mean()


class Slimming(Weights):
    """Reads the factors of a batch-norm that is fused."""

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.relu(self.norm(self.conv(x))).mean((2, 3))), self.norm.weight.abs().sum()


CALLS = [LinearCall, ConvCall, BufferCall, InnerCall, SeveralCalls, Tied, Read]
COMPUTED = [ComputedLinear, ComputedConv, ComputedConv1d]
READS = [BiasOfFused, BiasOfPlain, Penalty, Slimming]


class Joined(nn.Module):
    """Another module with one output."""

    def __init__(self, kind: type[Weights]) -> None:
        super().__init__()
        self.network = kind()

    def forward(self, x: Tensor) -> Tensor:
        result = self.network(x)
        return result[0] + result[1] if isinstance(result, tuple) else result


@pytest.mark.parametrize("kind", [*CALLS, *COMPUTED, *READS])
def test_int8_computes_what_loose_weights_do(kind: type[Weights], tmp_path: Path) -> None:
    x = torch.randn(8, 3, 7, 7)
    prepared, int8 = check(lambda: Joined(kind), x, tmp_path, min_sqnr=20)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
    assert all(not isinstance(value, torch.ScriptObject) for value in int8.state_dict().values())


@pytest.mark.parametrize("kind", [*CALLS, *READS])
def test_without_rounding_loose_weights_train_as_in_float(kind: type[Weights]) -> None:
    torch.manual_seed(0)
    x, network = torch.randn(8, 3, 7, 7), Joined(kind)
    plain = copy.deepcopy(network)
    prepared = prepare(network)
    set_enabled(prepared, observer=False, fake_quant=False)
    for each in (plain, prepared):
        train_steps(each, ((x,), {}))
    for name in ("conv.weight", "last.weight", "last.bias", "weight", "bias", "kernel", "inner.matrix"):
        ours = prepared.state_dict().get(f"network.{name}")
        if ours is not None:
            torch.testing.assert_close(ours, plain.get_parameter(f"network.{name}").detach())
    torch.testing.assert_close(prepared(x), plain(x))


@pytest.mark.parametrize(
    ("kind", "layer", "key"),
    [
        (LinearCall, "weight_linear", "weight"),
        (ConvCall, "kernel_conv2d", "kernel"),
        (InnerCall, "inner.matrix_linear", "inner.matrix"),
        (Tied, "last_weight_linear", "last.weight"),
        (Read, "weight_linear", "weight"),
    ],
)
def test_a_loose_weight_is_a_layer_and_keeps_its_key(kind: type[Weights], layer: str, key: str) -> None:
    prepared = copy.deepcopy(prepare(kind()))
    assert prepared.get_submodule(layer).weight is prepared.get_parameter(key)
    assert layer in recipe_of(prepared).layers  # type: ignore[union-attr]
    assert key in prepared.state_dict()
    count = sum(parameter is prepared.get_parameter(key) for parameter in prepared.parameters())
    assert count == 1


def test_the_float_weight_is_not_in_the_int8_network() -> None:
    prepared = prepare(LinearCall())
    train_steps(prepared, ((torch.randn(8, 3, 7, 7),), {}))
    assert not {"weight", "bias"} & set(convert(prepared).state_dict())


def test_a_checkpoint_with_loose_weights_loads(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 7, 7)
    prepared = prepare(Joined(SeveralCalls))
    train_steps(prepared, ((x,), {}))
    torch.save({"state_dict": prepared.state_dict()}, tmp_path / "qat.ckpt")
    loaded = load_qat_checkpoint(tmp_path / "qat.ckpt", Joined(SeveralCalls))
    assert torch.equal(loaded(x), prepared(x))


@pytest.mark.parametrize("keep", [F.linear, "torch.nn.functional.linear()", "inner", "inner.*"])
def test_a_layer_of_a_loose_weight_can_be_kept_float(keep: Any) -> None:
    prepared = prepare(InnerCall(), keep_float=[keep])
    assert type(prepared.get_submodule("inner.matrix_linear")) is nn.Linear
    assert hasattr(prepared.get_submodule("conv"), "weight_fake_quant")


def test_the_names_of_their_layers_are_found_again(tmp_path: Path) -> None:
    """A search for layers to keep float passes the names that it finds in a prepared network."""
    x, names = torch.randn(8, 3, 7, 7), ["inner.matrix_linear"]
    prepared = prepare(InnerCall(), keep_float=names)
    assert list(recipe_of(prepared).keep_float) == names  # type: ignore[union-attr]
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    assert torch.equal(load_int8(save_int8(int8, tmp_path / "int8.pt"), InnerCall())(x), int8(x))
    with pytest.raises(ValueError, match=r"'inner\.other', which matches nothing"):
        prepare(InnerCall(), keep_float=["inner.other"])


@pytest.mark.parametrize(
    "kind",
    [
        ComputedConv,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (LinearCall, ConvCall, BiasOfFused)),
    ],
)
def test_loose_weights_are_exported(kind: type[Weights], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, prepared = torch.randn(4, 3, 7, 7), prepare(kind())
    train_steps(prepared, ((x,), {}))
    export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=30)
    export_openvino(prepared, tmp_path / "int8.xml", (x,), min_sqnr=25)


class WeightsModule(pl.LightningModule):
    """Calls functions with its own weights and reads those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.weight, self.kernel = nn.Parameter(torch.randn(4, 8) / 3), nn.Parameter(torch.randn(4, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.last(torch.relu(self.conv(x)).mean((2, 3)))) + self.last.bias
        return F.linear(F.linear(y, self.weight), self.kernel - self.kernel.mean())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()


def test_a_lightning_module_with_loose_weights(tmp_path: Path) -> None:
    prepared, int8 = check(WeightsModule, torch.randn(8, 3, 7, 7), tmp_path)
    assert hasattr(prepared.weight_linear, "weight_fake_quant")
    assert is_int8(int8.weight_linear)


def test_attention_with_the_weights_of_linear_children() -> None:
    torch.manual_seed(0)
    network = torchvision.models.swin_t(num_classes=4).eval()
    prepared: Any = prepare(network, example_inputs=torch.randn(1, 3, 64, 64))
    kinds = [type(prepared.get_submodule(f"features.1.0.attn.{name}")).__name__ for name in ("qkv", "proj")]
    assert kinds == ["Linear", "Linear"]
    assert F.linear not in {node.target for node in prepared.graph.nodes}
    assert not [name for name, _ in prepared.named_modules() if name.endswith("_linear")]


class LayersModule(pl.LightningModule):
    """Has the layers of this file on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), FrozenBatchNorm2d(8)
        self.act, self.head = nn.PReLU(), nn.Conv2d(8, 8, 1)
        self.last = nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.act(self.norm(self.conv(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()


def test_a_lightning_module_with_such_layers(tmp_path: Path) -> None:
    prepared, int8 = check(LayersModule, torch.randn(8, 3, 7, 7), tmp_path, min_sqnr=20)
    assert type(prepared.conv).__name__ == type(prepared.head).__name__ == "ConvBn2d"
    assert is_int8(int8.conv)
    assert type(int8.act) is nn.PReLU
