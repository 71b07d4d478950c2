"""nn.MultiheadAttention, and torch.nn's transformers, in fx mode: their projections are int8 layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import convert, export_onnx, load_int8, load_qat_checkpoint, prepare, save_int8
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.functions.attention import attend
from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.modes.trace.own_layers import RowLayer
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import leaves, sqnr, train_steps

SIZE, HEADS, LENGTH, BATCH = 8, 2, 5, 3


@dataclass
class Case:
    """An attention, and how it is called.

    Attributes:
        made: Options of the constructor.
        called: Options of the call.
        masks: Which masks the call gets: "padding", "mask" or both.
        mask: The kind of `attn_mask`: "bool", "float", "causal", or "heads" with one for each head.
        inputs: "self", "cross" (key is value), or "three".
        unbatched: Whether the inputs have no batch.
    """

    made: dict[str, Any] = field(default_factory=dict)
    called: dict[str, Any] = field(default_factory=dict)
    masks: str = ""
    mask: str = "bool"
    inputs: str = "self"
    unbatched: bool = False


WITHOUT = {"need_weights": False}
CASES = {
    "self": Case(),
    "without weights": Case(called=WITHOUT),
    "weights of each head": Case(called={"average_attn_weights": False}),
    "batch first": Case({"batch_first": True}, WITHOUT),
    "unbatched": Case(unbatched=True, masks="padding"),
    "unbatched, without weights": Case({"batch_first": True}, WITHOUT, "mask", "heads", unbatched=True),
    "no bias": Case({"bias": False}),
    "bias of keys": Case({"add_bias_kv": True}, masks="padding mask"),
    "zeros": Case({"add_zero_attn": True}, WITHOUT, "padding mask", "float"),
    "bool mask": Case(called=WITHOUT, masks="mask"),
    "float mask": Case({"batch_first": True}, masks="mask", mask="float"),
    "mask of each head": Case(masks="mask", mask="heads"),
    "mask of each head, without weights": Case({"batch_first": True}, WITHOUT, "mask", "heads"),
    "padding": Case({"batch_first": True}, masks="padding"),
    "both masks": Case({"batch_first": True}, WITHOUT, "padding mask"),
    "causal": Case(called={**WITHOUT, "is_causal": True}, masks="mask", mask="causal"),
    "causal with weights": Case(called={"is_causal": True}, masks="mask", mask="causal"),
    "causal and padded": Case(called={**WITHOUT, "is_causal": True}, masks="padding mask", mask="causal"),
    "dropout": Case({"dropout": 0.3}),
    "dropout, without weights": Case({"dropout": 0.3, "batch_first": True}, WITHOUT),
    "cross": Case(inputs="cross", masks="padding"),
    "cross, without bias": Case({"bias": False}, WITHOUT, inputs="cross"),
    "three inputs": Case({"batch_first": True}, WITHOUT, inputs="three"),
    "other sizes": Case({"kdim": 6, "vdim": 6}, inputs="three"),
    "other sizes, without bias": Case({"kdim": 6, "vdim": 6, "bias": False}, inputs="cross"),
}


class Network(nn.Module):
    """An attention between two linear layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.first = nn.Linear(SIZE, SIZE)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, **case.made)
        self.head = nn.Linear(SIZE, 4)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor, mask: Tensor) -> Any:
        x = self.first(x)
        key, value = {"self": (x, x), "cross": (key, key), "three": (key, value)}[self.case.inputs]
        given = {
            "key_padding_mask": padding if "padding" in self.case.masks else None,
            "attn_mask": mask if "mask" in self.case.masks else None,
        }
        y, weights = self.attention(x, key, value, **given, **self.case.called)
        return self.head(y) if weights is None else (self.head(y), weights)


def inputs_of(case: Case, length: int = LENGTH, batch: int = BATCH) -> tuple[Tensor, ...]:
    source = length if case.inputs == "self" else length + 2
    generator = torch.Generator().manual_seed(0)

    def sequence(length: int, size: int) -> Tensor:
        shape = (batch, length, size) if case.made.get("batch_first") else (length, batch, size)
        x = torch.randn(shape, generator=generator)
        return x.select(0 if case.made.get("batch_first") else 1, 0) if case.unbatched else x

    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -2:] = True
    if case.mask == "float":
        padding = torch.zeros(batch, source).masked_fill(padding, -1e4)
    mask = torch.zeros(length, source, dtype=torch.bool)
    mask[1, :2] = True
    kinds = {
        "bool": mask,
        "float": torch.randn(length, source, generator=generator),
        "causal": torch.ones(length, source, dtype=torch.bool).triu(1),
        "heads": mask.expand((1 if case.unbatched else batch) * HEADS, -1, -1).clone(),
    }
    kdim, vdim = case.made.get("kdim", SIZE), case.made.get("vdim", SIZE)
    return (
        sequence(length, SIZE),
        sequence(source, kdim),
        sequence(source, vdim),
        padding[0] if case.unbatched else padding,
        kinds[case.mask],
    )


def assert_same(ours: nn.Module, plain: nn.Module, inputs: Any) -> None:
    """Asserts that outputs and gradients agree, with the same random numbers."""
    results = []
    for network in (ours, plain):
        network.zero_grad()
        torch.manual_seed(2)
        outputs = leaves(network(*inputs))
        if network.training:
            sum(each.square().sum() for each in outputs).backward()  # type: ignore[union-attr]
        results.append(outputs)
    torch.testing.assert_close(*results)
    if plain.training:
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(
    ("captured", "backend"),
    [(False, "x86"), pytest.param(True, "x86", marks=pytest.mark.slow), (False, "openvino")],
)
@pytest.mark.parametrize("name", CASES)
def test_without_rounding_it_computes_what_torch_does(name: str, captured: bool, backend: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    network = Network(case)
    plain, inputs = copy.deepcopy(network), inputs_of(case)
    prepared: Any = prepare(network, backend=backend, example_inputs=inputs if captured else None)
    called = {getattr(module, "function", None) for module in prepared.modules()}
    called |= {node.target for node in prepared.graph.nodes}
    # With int8 products, an attention whose weights nobody needs becomes its parts.
    in_parts = backend == "openvino" and case.called.get("need_weights") is False
    assert called & {attend, torch.matmul} == {torch.matmul if in_parts else attend}
    set_enabled(prepared, observer=False, fake_quant=False)
    for each in (inputs, inputs_of(case, LENGTH + 1, BATCH + 1)):
        assert_same(prepared.train(), plain.train(), each)
        assert_same(prepared.eval(), plain.eval(), each)
        with torch.no_grad():  # the fast path of torch.nn
            assert_same(prepared, plain, each)
    assert plain.state_dict().keys() < prepared.state_dict().keys()


INT8 = ("batch first", "bias of keys", "dropout", "both masks", "cross", "other sizes", "no bias")


@pytest.mark.parametrize("name", INT8)
def test_its_projections_are_int8(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    prepared, inputs = prepare(Network(case)), inputs_of(case)
    layers = recipe_of(prepared).layers  # type: ignore[union-attr]
    weights = ["in_proj_weight"] if case.inputs == "self" else [f"{each}_proj_weight" for each in "qkv"]
    projections = [f"attention.{weight}_linear" for weight in weights]
    if case.inputs == "cross":
        projections = [f"attention.in_proj_weight_linear{number}" for number in ("", "_2", "_3")]
    assert layers == ("first", *projections, "attention.out_proj", "head")
    train_steps(prepared, (inputs, {}))
    int8: Any = convert(prepared)
    kinds = {type(int8.get_submodule(layer)) for layer in layers}
    assert kinds == {Int8Layer}
    assert not any(key.endswith("_proj_weight") for key in int8.state_dict())
    torch.manual_seed(1)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Network(case))
    with torch.no_grad():
        expected, found, again = (leaves(network(*inputs))[0] for network in (prepared, int8, loaded))
        assert (expected != found).sum() <= found.numel() // 100
        assert torch.equal(found, again)
        set_enabled(prepared, observer=False, fake_quant=False)
        assert sqnr(leaves(prepared(*inputs))[0], expected) > 25


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("x86", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["both masks", *(pytest.param(n, marks=pytest.mark.slow) for n in ("batch first", "cross"))]
)
def test_it_runs_in_onnx_runtime(name: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared, inputs = prepare(Network(CASES[name]), backend=backend), inputs_of(CASES[name])
    train_steps(prepared, (inputs, {}))
    export_onnx(prepared, tmp_path / "int8.onnx", inputs, min_sqnr=30)  # compares the outputs


class Translator(nn.Module):
    """torch.nn's encoder and decoder, with masks."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = nn.Transformer(SIZE, HEADS, 1, 1, 16, batch_first=True, **options)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor, y: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": mask}
        return self.head(self.model(x, y, **masks, tgt_is_causal=True))


def sentences() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -2:] = True
    mask = torch.ones(LENGTH - 1, LENGTH - 1, dtype=torch.bool).triu(1)
    x, y = (torch.randn(BATCH, length, SIZE, generator=generator) for length in (LENGTH, LENGTH - 1))
    return x, y, padding, mask


ENCODER, DECODER = "model.encoder.layers.0", "model.decoder.layers.0"
LAYERS = (
    *(f"{ENCODER}.{name}" for name in ("self_attn.in_proj_weight_linear", "self_attn.out_proj")),
    *(f"{ENCODER}.{name}" for name in ("linear1", "linear2")),
    *(f"{DECODER}.{name}" for name in ("self_attn.in_proj_weight_linear", "self_attn.out_proj")),
    *(f"{DECODER}.multihead_attn.in_proj_weight_linear{number}" for number in ("", "_2", "_3")),
    *(f"{DECODER}.{name}" for name in ("multihead_attn.out_proj", "linear1", "linear2")),
    "head",
)


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_transformer_is_int8(captured: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, inputs = Translator(dropout=0.0), sentences()
    plain = copy.deepcopy(network)
    prepared = prepare(network, example_inputs=inputs if captured else None)
    assert set(recipe_of(prepared).layers) == set(LAYERS)  # type: ignore[union-attr]
    set_enabled(prepared, observer=False, fake_quant=False)
    for training in (True, False):
        assert_same(prepared.train(training), plain.train(training), inputs)
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, (inputs, {}))
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Translator(dropout=0.0))
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), int8(*inputs))
        assert sqnr(prepared(*inputs), int8(*inputs)) > 30
    export_onnx(prepared, tmp_path / "int8.onnx", inputs, min_sqnr=30)


@pytest.mark.parametrize(
    ("keep", "floating"),
    [
        (nn.MultiheadAttention, ("self_attn", "multihead_attn")),
        (f"{DECODER}.multihead_attn", ("multihead_attn",)),
        (f"{DECODER}.multihead_attn.out_proj", ("multihead_attn.out_proj",)),
        (f"{DECODER}.multihead_attn.in_proj_weight_linear_2", ("in_proj_weight_linear_2",)),
    ],
)
def test_attention_or_a_projection_can_be_kept_float(keep: Any, floating: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network, inputs = Translator(dropout=0.0), sentences()
    plain = copy.deepcopy(network)
    prepared = prepare(network, keep_float=[keep])
    expected = {name for name in LAYERS if not any(each in name for each in floating)}
    assert set(recipe_of(prepared).layers) == expected  # type: ignore[union-attr]
    set_enabled(prepared, observer=False, fake_quant=False)
    assert_same(prepared, plain, inputs)
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, (inputs, {}))
    int8 = convert(prepared)
    with torch.no_grad():
        assert sqnr(prepared(*inputs), int8(*inputs)) > 30
    assert {name for name, m in int8.named_modules() if isinstance(m, Int8Layer)} == expected
    assert not any(isinstance(module, RowLayer) for module in int8.modules())


def test_rows_of_a_parameter_stay_rows(tmp_path: Path) -> None:
    """Copies, other precisions and checkpoints keep the projections and their parameter together."""
    torch.manual_seed(0)
    case = CASES["cross"]
    network, inputs = Network(case), inputs_of(case)
    prepared = copy.deepcopy(prepare(network)).double().float()
    whole = prepared.get_parameter("attention.in_proj_weight")
    rows: Any = [module for module in prepared.modules() if isinstance(module, RowLayer)]
    assert [each.whole_weight is whole for each in rows] == [True] * 3
    assert torch.equal(torch.cat([each.weight for each in rows]), whole)
    assert sum(parameter is whole for parameter in prepared.parameters()) == 1
    prepared.load_state_dict(prepare(Network(case)).state_dict())
    assert torch.equal(torch.cat([each.weight for each in rows]), whole)
    train_steps(prepared, (inputs, {}))
    torch.save({"state_dict": prepared.state_dict()}, tmp_path / "qat.ckpt")
    loaded = load_qat_checkpoint(tmp_path / "qat.ckpt", Network(case))
    assert all(map(torch.equal, loaded(*inputs), prepared(*inputs)))


class Attending(pl.LightningModule):
    """Has an attention on itself, and calls it with its results and the attention's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.attention(y, x, x)[0] + self.attention.in_proj_weight.square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()


def test_a_lightning_module_with_an_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Attending(), torch.randn(BATCH, LENGTH, SIZE)
    plain = copy.deepcopy(module)
    prepared = prepare(module)
    assert prepared is module
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared(x), plain(x))
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Attending())
    with torch.no_grad():
        assert torch.equal(loaded(x), int8(x))
        assert sqnr(prepared(x), int8(x)) > 25


class Rows(nn.Module):
    """Linear functions with rows of a weight and of a bias, one with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, SIZE) / 3), nn.Parameter(torch.randn(12))
        self.fit, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.linear(x, self.weight[:SIZE], self.bias[:SIZE]))
        return self.head(F.linear(y, self.weight[SIZE:]) + F.linear(x, self.weight[-5:-1], self.fit))


@pytest.mark.parametrize("keep", [[], ["weight_linear"], ["weight_linear_2"]])
def test_functions_with_rows_of_a_weight_are_layers(keep: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Rows(), torch.randn(16, SIZE)
    plain = copy.deepcopy(network)
    prepared = prepare(network, keep_float=keep)
    names = {"weight_linear", "weight_linear_2", "weight_linear_3", "head"}
    assert set(recipe_of(prepared).layers) == names - set(keep)  # type: ignore[union-attr]
    set_enabled(prepared, observer=False, fake_quant=False)
    assert_same(prepared, plain, (x,))
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, ((x,), {}))
    int8: Any = convert(prepared)
    first = int8.get_submodule("weight_linear")
    if keep == ["weight_linear"]:
        assert type(first) is nn.Linear
    else:
        assert first.relu
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Rows())
    with torch.no_grad():
        assert torch.equal(loaded(x), int8(x))
        assert sqnr(prepared(x), int8(x)) > 30
    export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=30)


class Masked(Network):
    """Adds a number that is almost minus infinity to a mask, before attention with a dropout."""

    def forward(self, x: Tensor, bias: Tensor, far: Tensor) -> Any:  # type: ignore[override]
        x = self.first(x)
        return self.head(self.attention(x, x, x, attn_mask=bias + far)[0])


def test_a_mask_is_not_rounded_in_a_network_with_dropout() -> None:
    torch.manual_seed(0)
    prepared = prepare(Masked(Case({"dropout": 0.1})))
    bias, far = torch.randn(LENGTH, LENGTH), torch.zeros(LENGTH, LENGTH)
    far[:, -1] = -1e4
    inputs = torch.randn(LENGTH, BATCH, SIZE), bias, far
    train_steps(prepared, (inputs, {}))
    with torch.no_grad():
        expected = prepared(*inputs)
        set_enabled(prepared, observer=False, fake_quant=False)
        assert sqnr(prepared(*inputs), expected) > 25


class Rerouted(nn.Module):
    """Takes another path in training, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.training and x.sum() > 0 else x


def test_a_part_that_is_called_as_a_whole_leaves_attention_int8() -> None:
    prepared = prepare(nn.Sequential(nn.TransformerEncoderLayer(SIZE, HEADS, 16), Rerouted()))
    layers = recipe_of(prepared).layers  # type: ignore[union-attr]
    assert layers == ("0.self_attn.in_proj_weight_linear", "0.self_attn.out_proj", "0.linear1", "0.linear2")
