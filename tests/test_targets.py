"""The backends onnxruntime and openvino: what is rounded, what stays float, and that the runtimes agree."""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_lightning import (
    convert,
    export_onnx,
    export_openvino,
    load_int8,
    load_runtime,
    prepare,
    save_int8,
)
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.functions.attention import attention_weights
from qat_lightning.modes.graph.nodes import fake_quantize_of
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import sqnr, train_steps

RUNTIMES = ("onnxruntime", "openvino")


class Block(nn.Module):
    """A block of a transformer, with a mask and dropout in its attention."""

    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Gated(nn.Module):
    """An inverted bottleneck with SiLU, a gate, a residual and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1))
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1))
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        x = x + self.point(y * self.gate(y).sigmoid())
        return self.last(self.up(x))


INPUTS = {Block: (4, 5, 16), Gated: (4, 3, 8, 8)}


def trained(kind: type[nn.Module], backend: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(INPUTS[kind])
    prepared = prepare(kind(), backend=backend, **options)
    train_steps(prepared, ((x,), {}))
    set_enabled(prepared, observer=False, fake_quant=True)
    return prepared.eval(), x


def reads_rounded(prepared: fx.GraphModule, node: fx.Node) -> list[bool]:
    return [fake_quantize_of(prepared, source) is not None for source in node.all_input_nodes]


def export(prepared: Any, x: Tensor, backend: str, folder: Path) -> Any:
    if backend == "onnxruntime":
        return load_runtime(export_onnx(prepared, folder / "int8.onnx", (x,)))
    return load_runtime(export_openvino(prepared, folder / "int8.xml", (x,)))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("backend", RUNTIMES)
def test_the_runtime_and_int8_compute_what_was_trained(
    backend: str, kind: type[nn.Module], tmp_path: Path
) -> None:
    prepared, x = trained(kind, backend)
    int8 = convert(prepared)
    with torch.no_grad():
        expected = prepared(x)
        assert sqnr(expected, int8(x)) > 35
        assert sqnr(expected, export(prepared, x, backend, tmp_path)(x)) > 30
        loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), kind())
        assert torch.equal(loaded(x), int8(x))


@pytest.mark.parametrize("backend", RUNTIMES)
def test_the_products_of_attention_read_rounded_tensors_and_sums_stay_float(backend: str) -> None:
    prepared, _ = trained(Block, backend)
    products = [node for node in prepared.graph.nodes if node.target is torch.matmul]
    assert [reads_rounded(prepared, node) for node in products] == [[True, True]] * 2
    sums = [node for node in prepared.graph.nodes if node.target is operator.add]
    assert [reads_rounded(prepared, node) for node in sums] == [[False, False]] * 2


def test_openvino_rounds_nothing_between_a_layer_and_its_activation() -> None:
    prepared, _ = trained(Gated, "openvino")
    activations = [n for n in prepared.graph.nodes if isinstance(n.target, str) and n.target.endswith(".2")]
    assert [reads_rounded(prepared, node) for node in activations] == [[False]] * 4


def test_onnx_runtime_computes_a_silu_in_int8() -> None:
    prepared, _ = trained(Gated, "onnxruntime")
    sigmoids = [node for node in prepared.graph.nodes if node.target is torch.sigmoid]
    assert [reads_rounded(prepared, node) for node in sigmoids] == [[True]] * 3
    products = [node for node in prepared.graph.nodes if node.target is operator.mul]
    assert [reads_rounded(prepared, node) for node in products] == [[True, True]] * 4
    kept, _ = trained(Gated, "onnxruntime", keep_float=[nn.SiLU])
    assert not [node for node in kept.graph.nodes if node.target is torch.sigmoid]


@pytest.mark.parametrize("backend", RUNTIMES)
def test_more_of_a_transformer_is_left_than_with_pytorchs_kernels(backend: str) -> None:
    """A float residual stream keeps the precision that LayerNorm needs."""

    def fidelity(backend: str) -> float:
        prepared, x = trained(Block, backend)
        with torch.no_grad():
            rounded = prepared(x)
            set_enabled(prepared, observer=False, fake_quant=False)
            return sqnr(prepared(x), rounded)

    assert fidelity(backend) > fidelity("onednn") + 3


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": torch.rand(5, 7) > 0.4},
    "number": {"attn_mask": torch.randn(5, 7)},
    "row without keys": {"attn_mask": torch.arange(5).view(5, 1) > torch.zeros(1, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_the_parts_of_attention_are_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    arguments = {"mask" if name == "attn_mask" else name: value for name, value in options.items()}
    weights = attention_weights(q @ k.mT, width=4, **arguments)
    torch.testing.assert_close(weights @ v, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("masked", [False, True])
def test_without_rounding_a_transformer_is_the_float_network(masked: bool) -> None:
    torch.manual_seed(0)
    network, x = Block(dropout=0.5), torch.randn(2, 5, 16)
    inputs = (x, torch.ones(5, 5).tril().bool()) if masked else (x,)
    expected = network.eval()(*inputs)
    prepared = prepare(network.train(), backend="openvino", example_inputs=inputs)
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared.eval()(*inputs), expected)
    assert not torch.equal(prepared.train()(*inputs), expected)  # dropout
    assert not torch.equal(prepared(*inputs), prepared(*inputs))


def test_attention_that_stays_float() -> None:
    prepared, _ = trained(Block, "openvino", keep_float=[F.scaled_dot_product_attention])
    assert torch.matmul not in {node.target for node in prepared.graph.nodes}
    assert F.scaled_dot_product_attention in {node.target for node in prepared.graph.nodes}


def test_splits_and_pads_keep_the_qparams_of_their_input() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).relu().chunk(2, 1)
            return self.second(F.pad(torch.cat([right, left], 1), (1, 1, 1, 1)))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    prepared = prepare(Shuffled(), backend="onednn")
    train_steps(prepared, ((x,), {}))
    activations = [name for name, _ in fake_quantizes(prepared) if not name.endswith("weight_fake_quant")]
    assert len(activations) == 3
    with torch.no_grad():
        assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 40


class Dense(nn.Module):
    """Concatenates, and normalizes before it convolves, as DenseNet does."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine)
        self.conv, self.last_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.conv(F.relu(self.norm(x)))
        return self.last(F.relu(self.last_norm(torch.cat([x, y], 1))))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_batch_norm_before_a_convolution_is_int8(backend: str, affine: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, plain = torch.randn(4, 3, 8, 8), Dense(affine)
    network = copy.deepcopy(plain)
    prepared: Any = prepare(network, backend=backend)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert ({"norm", "last_norm"} < set(recipe.layers)) == (backend == "onnxruntime")
    set_enabled(prepared, observer=False, fake_quant=False)
    for each in (plain, prepared):
        train_steps(each, ((x,), {}))
    torch.testing.assert_close(prepared.eval()(x), plain.eval()(x))
    for parameter, value in plain.named_parameters():
        inner = parameter.replace("norm.", "norm.bn." if backend == "onnxruntime" else "norm.0.")
        torch.testing.assert_close(prepared.get_parameter(inner), value)
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared.eval())
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 35
        assert sqnr(prepared(x), export(prepared, x, backend, tmp_path)(x)) > 30
        loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Dense(affine))
        assert torch.equal(loaded(x), int8(x))


def test_a_batch_norm_after_a_float_layer_stays_float() -> None:
    for backend in ("onednn", *RUNTIMES):
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        prepared: Any = prepare(network, backend=backend, keep_float=["1"])
        (norm,) = (node for node in prepared.graph.nodes if node.target == "2")
        assert reads_rounded(prepared, norm) == [False]
        assert type(prepared.get_submodule("2")) is nn.BatchNorm2d


class Rejoined(nn.Module):
    """Concatenates the parts of a tensor, which no node takes apart."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.between, self.first, self.last = between, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat(torch.split(self.between(self.first(x)), 4, 1), 1))


@pytest.mark.parametrize("between", [nn.Identity(), torch.sin])
@pytest.mark.parametrize("backend", ["onednn", *RUNTIMES])
def test_parts_that_are_joined_again(backend: str, between: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(Rejoined(between), backend=backend)
    train_steps(prepared, ((x,), {}))
    with torch.no_grad():
        assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 35
