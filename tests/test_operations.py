"""A user changes what is quantized, by type and by function: `operations` and `overrides`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import (
    RecipeMismatchError,
    convert,
    export_onnx,
    load_int8,
    load_runtime,
    prepare,
    save_int8,
)
from qat_lightning.modes.graph.nodes import fake_quantize_of
from qat_lightning.modes.qconfig import default_qconfig
from qat_lightning.quantize.networks import prepare_module
from qat_lightning.quantize.options import Settings
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import Residual, Stubbed, sqnr, train_steps
from tests.runs import TinyModule


class Swish(nn.Module):
    """An activation with a parameter, which a trace would take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x)


def swap_halves(x: Tensor) -> Tensor:
    """Moves values, by a path that no symbolic trace can follow."""
    if x.shape[1] % 2:
        raise ValueError("odd")
    return torch.cat([x[:, 4:], x[:, :4]], 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 8, 3), Swish(), nn.Conv2d(8, 8, 3)
        self.soft, self.last = nn.Softsign(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.soft(swap_halves(self.second(self.act(self.first(x))))))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rounded_behind(prepared: Any, name: str) -> bool:
    """Whether the result of a call is rounded at once."""
    (node,) = (n for n in prepared.graph.nodes if n.name == name)
    return all(fake_quantize_of(prepared, user) is not None for user in node.users)


DECLARED = {Swish: "computes", swap_halves: "moves"}


@pytest.mark.parametrize(
    ("backend", "example"), [("onednn", None), ("openvino", (images(),))], ids=["symbolic", "captured"]
)
def test_declared_operations(backend: str, example: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared: Any = prepare(Network(), backend=backend, operations=DECLARED, example_inputs=example)
    assert not rounded_behind(prepared, "swap_halves")
    assert rounded_behind(prepared, "act")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.operations == {"act": "computes", f"{__name__}.swap_halves()": "moves"}
    train_steps(prepared, ((x := images(),), {}))
    int8 = convert(prepared.eval())
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 40
        assert torch.equal(load_int8(save_int8(int8, tmp_path / "int8.pt"), Network())(x), int8(x))
    export = load_runtime(export_onnx(prepared, tmp_path / "int8.onnx", (x,)))
    assert sqnr(prepared(x), export(x)) > 40


class Text(nn.Module):
    """An embedding, whose weight the last layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(500, 16, padding_idx=0), nn.LayerNorm(16)
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 500)
        self.last.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.layer(self.norm(self.words(words))).relu())


@pytest.mark.parametrize(("backend", "captured"), [("onednn", False), ("onnxruntime", True)])
def test_rows_of_an_embedding(backend: str, captured: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 500, (4, 6))
    plain, example = Text(), (words,) if captured else None
    before = plain.words.weight.detach().clone()
    prepared: Any = prepare(plain, backend=backend, operations={nn.Embedding: "rows"}, example_inputs=example)
    assert dict(prepared.named_parameters())["words.weight"] is prepared.get_submodule("last").weight
    train_steps(prepared, ((words,), {}))
    prepared.eval()
    assert not torch.equal(prepared.get_parameter("words.weight"), before)
    int8 = convert(prepared)
    path = save_int8(int8, tmp_path / "int8.pt")
    with torch.no_grad():
        assert sqnr(prepared(words), int8(words)) > 40
        assert torch.equal(load_int8(path, Text())(words), int8(words))
    assert "words.weight" not in int8.state_dict()
    tables = {each.dtype for each in int8.buffers() if each.shape == (500, 16)}
    assert tables == {torch.int8}
    file = export_onnx(prepared, tmp_path / "int8.onnx", (words,))
    assert sqnr(prepared(words), load_runtime(file)(words)) > 40


def test_only_embeddings_have_rows() -> None:
    for layer in (Swish(), nn.Embedding(5, 8, max_norm=1.0), nn.Embedding(5, 8, sparse=True)):
        with pytest.raises(ValueError, match=r"operations says of '0' that it returns 'rows'.* but it is"):
            prepare(nn.Sequential(layer, nn.Linear(8, 4)), operations={"0": "rows"})


def test_what_is_not_declared_is_traced_and_float() -> None:
    prepared: Any = prepare(Network(), backend="onednn", example_inputs=(images(),))
    called = {str(node.target) for node in prepared.graph.nodes}
    assert "act" not in called
    assert swap_halves not in {node.target for node in prepared.graph.nodes}


def test_a_rule_of_the_backend_gives_way() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    declared = {"torch.nn.SiLU": "float", "1": "computes"}
    prepared: Any = prepare(network, backend="onnxruntime", operations=declared)
    assert torch.sigmoid not in {node.target for node in prepared.graph.nodes}
    assert not prepared.get_submodule("0").relu
    assert rounded_behind(prepared, "_1")


def test_another_declaration_does_not_fit_a_checkpoint() -> None:
    state = prepare(Network(), operations=DECLARED).state_dict()
    with pytest.raises(RecipeMismatchError, match=r"operations is \{.*'moves'\} in the state dict"):
        prepare(Network(), operations={**DECLARED, swap_halves: "averages"}).load_state_dict(state)


def nested() -> Any:
    def inside(x: Tensor) -> Tensor:
        return x

    return inside


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "value": ({Swish: "compute"}, ValueError, r"'compute', but must say one of .*Nearest: 'computes'"),
    "no mapping": ([Swish], TypeError, r"operations must map .* received list"),
    "key": ({3: "moves"}, TypeError, r"operations takes names.*received 3"),
    "name": ({"atc": "computes"}, ValueError, r"operations has 'atc', which matches nothing.*Nearest: 'act'"),
    "type": ({nn.GELU: "computes"}, ValueError, r"operations has 'GELU', which matches nothing in Network"),
    "type by name": ({"torch.nn.Softsin": "float"}, ValueError, r"Nearest: 'torch\.nn\.Softsign'"),
    "function": (
        {torch.erf: "computes"},
        ValueError,
        r"'torch\.erf\(\)', which the graph of Network does not",
    ),
    "nested function": (
        {nested(): "moves"},
        ValueError,
        r"inside\(\)', which the graph .* A function of your",
    ),
    "layer": ({nn.Conv2d: "computes"}, ValueError, r"'first' to be one operation, but it holds layers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    operations, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        prepare(Network(), operations=operations, example_inputs=(images(),))


def test_eager_mode_has_no_graph() -> None:
    with pytest.raises(
        ValueError, match=r"operations declares 'add', but in eager mode Stubbed runs its own"
    ):
        prepare(Stubbed(), operations={"add": "computes"})
    with pytest.raises(ValueError, match=r"operations has the function 'torch\.add\(\)', but in eager mode"):
        prepare(Stubbed(), operations={torch.add: "computes"})


def test_each_network_of_a_module_gets_its_own() -> None:
    module = TinyModule(Network())
    module.other = Residual()
    declared = {**DECLARED, "torch.Tensor.mean()": "averages"}
    first, second = prepare_module(module, Settings(operations=declared))
    assert first.recipe.operations == {"act": "computes", f"{__name__}.swap_halves()": "moves"}
    assert second.recipe.operations == {"torch.Tensor.mean()": "averages"}


def test_hydra_passes_names() -> None:
    config = {
        "_target_": "qat_lightning.QuantizationAwareTraining",
        "operations": {f"{__name__}.Swish": "computes", f"{__name__}.swap_halves()": "moves"},
        "overrides": {"nn.Conv2d": "onednn", "torch.nn.Softsign": "onednn"},
    }
    qat = hydra.utils.instantiate(config)
    (made,) = prepare_module(TinyModule(Network()), qat.settings)
    assert made.recipe.operations == {"act": "computes", f"{__name__}.swap_halves()": "moves"}
    assert made.recipe.overrides == dict.fromkeys(("first", "second", "soft", "last"), "onednn")


class Products(nn.Module):
    """Layers, an activation and a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.Hardswish(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.last(torch.matmul(x, F.hardswish(x).transpose(1, 2)) @ x)


OVERRIDES: dict[Any, Any] = {nn.Linear: "x86", torch.matmul: "x86", nn.Hardswish: default_qconfig("qnnpack")}


def test_overrides_by_type_and_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    prepared: Any = prepare(Products(), backend="onednn", overrides=OVERRIDES)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert set(recipe.overrides) == {"first", "act", "last", "torch.matmul()"}
    calls = [n for n in prepared.graph.nodes if fake_quantize_of(prepared, n) is not None]
    assert {n.all_input_nodes[0].name: int(fake_quantize_of(prepared, n).quant_max) for n in calls} == {
        **dict.fromkeys(("x", "first", "matmul", "last"), 127),
        **dict.fromkeys(("act", "hardswish", "matmul_1"), 255),
    }
    (act,) = (n for n in calls if n.all_input_nodes[0].name == "act")
    assert fake_quantize_of(prepared, act).activation_post_process.eps == 2**-12
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared.eval())
    path = save_int8(int8, tmp_path / "int8.pt")
    assert torch.equal(load_int8(path, Products(), overrides=OVERRIDES)(x), int8(x))
    with pytest.raises(RecipeMismatchError, match="'act' was prepared with a QConfig of its own"):
        load_int8(path, Products())


def test_overrides_in_eager_mode_and_mistakes() -> None:
    recipe = recipe_of(prepare(Stubbed(), overrides={nn.Conv2d: "onednn", "torch.nn.Linear": None}))
    assert recipe is not None
    assert recipe.overrides == {"conv1": "onednn", "conv2": "onednn"}
    assert recipe.keep_float == ("fc",)
    with pytest.raises(ValueError, match=r"overrides has the function 'torch\.add\(\)', but in eager mode"):
        prepare(Stubbed(), overrides={torch.add: "onednn"})
    with pytest.raises(ValueError, match=r"overrides has 'GELU', which matches nothing in Residual"):
        prepare(Residual(), overrides={nn.GELU: "onednn"})
