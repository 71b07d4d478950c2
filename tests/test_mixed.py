"""Mixed precision: functions that stay float, and layers with a QConfig of their own."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig
from torch.nn import functional as F

from qat_lightning import (
    FakeQuantize,
    QuantizationAwareTraining,
    RecipeMismatchError,
    convert,
    export_onnx,
    load_int8,
    load_qat_checkpoint,
    prepare,
    save_int8,
)
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.graph.functions import node_function
from qat_lightning.modes.qconfig import default_qconfig
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import CLASSES, ConvBnRelu, Residual, Stubbed, images, sqnr, train_steps
from tests.runs import TinyModule, trainer


class Functional(nn.Module):
    """Additions, a concatenation, a product of matrices and functions of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBnRelu()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(x + self.conv(x))
        z = torch.relu(self.conv(y))
        pooled = torch.cat([y, F.gelu(z), x.mul(y)], dim=1).mean((2, 3))
        return torch.matmul(self.fc(pooled), torch.eye(CLASSES))


FUNCTIONS: list[Any] = [
    operator.add, torch.cat, torch.matmul, F.gelu, torch.Tensor.mul, torch.Tensor.mean, "operator.add()"
]  # fmt: skip
# A ReLU is one function, however it is spelled.
CHOICES = [[F.relu, torch.relu], *([f] for f in FUNCTIONS), [F.relu, torch.relu, *FUNCTIONS]]


def names(functions: list[Any]) -> str:
    return "+".join(f if isinstance(f, str) else f.__qualname__ for f in functions)


def settled(prepared: nn.Module, x: Tensor) -> nn.Module:
    train_steps(prepared, ((x,), {}))
    set_enabled(prepared, observer=False, fake_quant=True)
    return prepared


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
@pytest.mark.parametrize("functions", CHOICES, ids=names)
def test_a_function_stays_float(functions: list[Any], backend: str, tmp_path: Path) -> None:
    prepared = settled(prepare(Functional(), keep_float=functions, backend=backend), x := images())
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert all(name.endswith("()") for name in recipe.keep_float)
    int8: Any = convert(prepared)
    with torch.no_grad():
        fake, found = prepared(x), int8(x)
    assert sqnr(fake, found) > 25
    dtypes = dtypes_of(int8, recipe.keep_float, x)
    if backend == "qnnpack":
        assert dtypes == {torch.float32}
    else:  # a table of bytes may stand for the function, if it returns the same
        assert dtypes <= {torch.float32}
        assert torch.equal(fake, found)
    loaded = load_int8(save_int8(convert(prepared), tmp_path / "int8.pt"), Functional())
    assert torch.equal(loaded(x), int8(x))


def dtypes_of(int8: Any, names: tuple[str, ...], x: Tensor) -> set[torch.dtype]:
    """The dtypes of the tensors that functions read and return, in a run of an int8 graph."""
    seen: set[torch.dtype] = set()

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if node_function(n) in names:
                read = [self.env[source] for source in n.all_input_nodes]
                seen.update(tensor.dtype for tensor in (*read, result))
            return result

    with torch.no_grad():
        Watching(int8).run(x)
    return seen


def test_all_calls_and_no_others() -> None:
    prepared: Any = settled(prepare(Functional(), keep_float=[operator.add]), x := images())
    int8 = convert(prepared)
    assert dtypes_of(int8, ("operator.add()",), x) == {torch.float32}
    assert dtypes_of(int8, ("torch.cat()",), x) == {torch.uint8}
    everything = recipe_of(prepare(Functional()))
    some = recipe_of(prepared)
    assert everything is not None
    assert some is not None
    assert some.layers == everything.layers
    assert len(some.grid) < len(everything.grid) + 1


def test_functions_in_a_graph_with_kept_modules_and_onnx(tmp_path: Path) -> None:
    keep: list[Any] = ["stem", nn.Linear, operator.add]
    prepared = settled(prepare(Functional(), keep_float=keep, backend="onednn"), images())
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.keep_float == ("stem", "fc", "operator.add()")
    export_onnx(prepared, tmp_path / "functional.onnx", (images(4),))


def test_a_relu6_that_stays_float_stays_a_relu6() -> None:
    class Clamped(ConvBnRelu):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(100 * self.conv(x))

    with torch.no_grad():
        assert prepare(Clamped(), keep_float=[F.relu6]).eval()(images()).max() == 6


def test_functions_that_are_not_called_and_eager_mode() -> None:
    with pytest.raises(
        ValueError, match=r"'torch\.sub\(\)', which the graph of Functional does not call\. Near"
    ):
        prepare(Functional(), keep_float=[torch.sub])
    with pytest.raises(ValueError, match=r"'operator\.ad\(\)'.*Nearest: 'operator\.add\(\)'"):
        prepare(Functional(), keep_float=["operator.ad()"])
    with pytest.raises(ValueError, match=r"'torch\.add\(\)', but in eager mode Stubbed runs its own code"):
        prepare(Stubbed(), keep_float=[torch.add])


class Pair(TinyModule):
    def __init__(self) -> None:
        super().__init__(Functional())
        self.other, self.eager = Residual(), Stubbed()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.other(x) + self.eager(x)


def test_in_a_module_with_several_networks(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(
        keep_float=[torch.cat], overrides={"block": "onednn", "conv1": None}, output_dir=tmp_path
    )
    module = Pair()
    trainer(tmp_path, qat, max_epochs=1).fit(module)
    first, second, third = (recipe_of(n) for n in (module.model, module.other, module.eager))
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.keep_float, first.overrides) == (("torch.cat()",), {})
    assert (second.keep_float, second.overrides) == ((), {"block.0": "onednn"})
    assert (third.keep_float, third.overrides) == (("conv1",), {})
    x = images()
    assert torch.equal(load_int8(tmp_path / "int8.pt", Pair())(x), qat.int8_module(x))  # type: ignore[misc]


PER_TENSOR = QConfig(
    activation=default_qconfig("onednn").activation,
    weight=FakeQuantize.with_args(
        observer=torch.ao.quantization.MinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
)  # fmt: skip


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_overrides(build: Any, tmp_path: Path) -> None:
    first = "stem.0" if build is Residual else "conv1"
    overrides = {"*": "x86", first: PER_TENSOR, "fc": None}
    prepared = settled(prepare(build(), backend="onednn", overrides=overrides), x := images())
    recipe = recipe_of(prepared)
    assert recipe is not None
    second = "block.0" if build is Residual else "conv2"
    assert recipe.keep_float == ("fc",)
    assert recipe.overrides.keys() == {first, second}
    assert recipe.overrides[second] == "x86"
    assert recipe.overrides[first].startswith("sha256:")
    assert "per_tensor" in recipe.grid[f"{first}.weight_fake_quant"]
    assert "per_channel" in recipe.grid[f"{second}.weight_fake_quant"]
    int8 = convert(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 25
    path = save_int8(int8, tmp_path / "int8.pt")
    assert torch.equal(load_int8(path, build(), overrides=overrides)(x), int8(x))
    with pytest.raises(RecipeMismatchError, match=f"'{first}' was prepared with a QConfig of its own"):
        load_int8(path, build())
    torch.save({"state_dict": prepared.state_dict()}, tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(tmp_path / "last.ckpt", build(), overrides={first: PER_TENSOR})
    assert torch.equal(loaded(x), prepared(x))


def test_another_override_does_not_fit_a_checkpoint() -> None:
    state = prepare(Residual(), overrides={"fc": "onednn"}).state_dict()
    with pytest.raises(RecipeMismatchError, match=r"qparams of \d+ fake-quantizes differ"):
        prepare(Residual()).load_state_dict(state)


def test_overrides_that_match_no_layer_or_are_none() -> None:
    with pytest.raises(ValueError, match=r"overrides has 'blok\.\*', which matches no convolution"):
        prepare(Residual(), overrides={"blok.*": None})
    with pytest.raises(ValueError, match=r"overrides has '\*\.2', which matches no convolution"):
        prepare(Residual(), overrides={"*.2": None})
    with pytest.raises(TypeError, match=r"overrides map names or globs of layers.*received str: 'int4'"):
        prepare(Residual(), overrides={"fc": "int4"})


def test_hydra_passes_them(tmp_path: Path) -> None:
    config = {
        "_target_": "qat_lightning.QuantizationAwareTraining",
        "keep_float": ["operator.add()"],
        "overrides": {"fc": None, "stem.*": "onednn"},
        "untraceable": "float",
    }
    qat = hydra.utils.instantiate(config)
    module = TinyModule()
    trainer(tmp_path, qat, fast_dev_run=True).fit(module)
    recipe = recipe_of(module.model)
    assert recipe is not None
    assert recipe.keep_float == ("fc", "operator.add()")
    assert recipe.overrides == {"stem.0": "onednn"}


def test_torchvision_additions_stay_float() -> None:
    network = torchvision.models.mobilenet_v2(num_classes=CLASSES)
    prepared = prepare(network, keep_float=[operator.add], overrides={"features.0": "onednn"}, backend="x86")
    x = torch.randn(4, 3, 64, 64)
    settled(prepared, x)
    int8: Any = convert(prepared)
    assert dtypes_of(int8, ("operator.add()",), x) == {torch.float32}
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 20
