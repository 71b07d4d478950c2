"""Layers, norms and weights in forms that torch.ao does not know, each held to its right numbers.

A fake-quantized network in eval mode and its int8 form agree, as does what `load_int8` makes of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typing_extensions
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.quantization import DeQuantStub, QuantStub

from qat_lightning import convert, export_onnx, export_openvino, load_int8, preflight, prepare, save_int8
from qat_lightning.base.errors import PreflightError
from qat_lightning.export.load import load_graph
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.graph.lines import is_user_file
from qat_lightning.modes.graph.pads import pad_values
from qat_lightning.quantize.copies import copy_of
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
    pads = [node for node in int8.graph.nodes if node.target is pad_values]
    assert len(pads) == (0 if mode == "reflect" and dims < 3 else 2)
    dequantized = [node for node in int8.graph.nodes if node.target == "dequantize"]
    assert len(dequantized) == 1  # the output alone: the paddings run on integers


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


@pytest.mark.parametrize("mode", ["circular", "replicate"])
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
