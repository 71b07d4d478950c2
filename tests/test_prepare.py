from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from qat_lightning import convert, prepare
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import (
    CASES,
    Case,
    ConvBnRelu,
    Embedded,
    Residual,
    Stubbed,
    StubbedConvBnRelu,
    images,
    leaves,
    same_state,
    train_steps,
)

ENGINES = [name for name in torch.backends.quantized.supported_engines if name != "none"]
OWN = QConfig(
    activation=FakeQuantize.with_args(
        observer=MinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    ),
    weight=FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ),
)
BUILDERS = {"fx": (ConvBnRelu, Residual), "eager": (StubbedConvBnRelu, Stubbed)}


def names_of(network: nn.Module) -> list[str]:
    return [name for name, _ in fake_quantizes(network)]


@pytest.mark.parametrize(("activation", "unfused"), [(nn.ReLU, 3), (nn.ReLU6, 4)])
def test_fusion_leaves_two_fake_quantizes(activation: type[nn.Module], unfused: int) -> None:
    """Unfused there are the weight's and one after each layer; a ReLU that is not fused keeps its input's."""
    together = prepare(StubbedConvBnRelu(activation), fuse=[["conv", "bn", "relu"]])
    apart = prepare(StubbedConvBnRelu(activation), fuse=[], replace_relu6=False)
    assert _without_stub(together) == ["conv.weight_fake_quant", "conv.activation_post_process"]
    assert len(_without_stub(apart)) == unfused


def _without_stub(network: nn.Module) -> list[str]:
    return [name for name in names_of(network) if not name.startswith("quant.")]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_fx_fuses_by_itself(activation: type[nn.Module]) -> None:
    prepared = prepare(ConvBnRelu(activation))
    assert sorted(names_of(prepared)) == [
        "activation_post_process_0",  # the input
        "activation_post_process_1",  # after the ReLU
        "conv.weight_fake_quant",
    ]


def test_relu6_can_stay() -> None:
    kept = prepare(ConvBnRelu(nn.ReLU6), replace_relu6=False)
    replaced = prepare(ConvBnRelu(nn.ReLU6))
    assert [type(m).__name__ for m in kept.modules() if isinstance(m, nn.Hardtanh)] == ["ReLU6"]
    assert not any(isinstance(m, nn.Hardtanh) for m in replaced.modules())


@pytest.mark.parametrize(
    ("mode", "pattern", "floating"),
    [
        ("fx", "fc", ["fc"]),
        ("fx", "block.*", ["block.0", "block.1", "block.2"]),
        ("fx", nn.Linear, ["fc"]),
        ("eager", "fc", ["fc"]),
        ("eager", "[f]*", ["fc"]),
        ("eager", nn.Linear, ["fc"]),
    ],
)
def test_keep_float_by_name_glob_and_type(
    mode: str, pattern: str | type[nn.Module], floating: Sequence[str]
) -> None:
    network = BUILDERS[mode][1]()
    prepared = prepare(network, mode=mode, keep_float=[pattern])
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert list(recipe.keep_float) == list(floating)
    assert not set(floating) & set(recipe.layers)
    train_steps(prepared, ((images(),), {}))
    int8 = convert(prepared)
    assert {p.dtype for p in int8.get_submodule(floating[0]).parameters()} == {torch.float32}
    assert torch.isfinite(int8(images())).all()


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_float_layer_between_int8_ones_gets_and_gives_floats(mode: str) -> None:
    network = BUILDERS[mode][1]()
    middle = "block" if mode == "fx" else "relu2"
    seen: list[torch.dtype] = []
    prepared = prepare(network, mode=mode, keep_float=[middle], fuse="auto" if mode == "fx" else [])
    train_steps(prepared, ((images(),), {}))
    int8 = convert(prepared)
    inner = int8.get_submodule("block.0" if mode == "fx" else middle)
    inner.register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    int8(images())
    assert seen == [torch.float32]


@pytest.mark.parametrize("mode", ["fx", "eager"])
@pytest.mark.parametrize("backend", ENGINES)
def test_every_backend_of_this_machine(backend: str, mode: str) -> None:
    torch.manual_seed(0)
    x = images()
    prepared = prepare(BUILDERS[mode][1](), backend=backend, mode=mode)
    train_steps(prepared, ((x,), {}))
    int8 = convert(prepared)
    recipe = recipe_of(int8)
    assert recipe is not None
    assert recipe.backend == backend
    high = {
        grid.split(", ")[1] for name, grid in recipe.grid.items() if not name.endswith("weight_fake_quant")
    }
    assert high == {"127]" if backend in ("x86", "fbgemm") else "255]"}
    assert torch.isfinite(int8(x)).all()


def test_the_engine_of_torch_is_left_as_it_was() -> None:
    before = torch.backends.quantized.engine
    prepared = prepare(Residual(), backend="qnnpack")
    assert torch.backends.quantized.engine == before
    train_steps(prepared, ((images(),), {}))
    int8 = convert(prepared)
    assert torch.backends.quantized.engine == before
    seen: list[str] = []
    int8.get_submodule("fc").register_forward_hook(lambda *_: seen.append(torch.backends.quantized.engine))
    int8(images())
    assert seen == ["qnnpack"]
    assert torch.backends.quantized.engine == before
    with pytest.raises(ValueError, match="Input shape"):
        int8(torch.randn(1, 7))
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("mode", ["fx", "eager"])
@pytest.mark.parametrize("form", ["qconfig", "mapping"])
def test_a_qconfig_of_ones_own(mode: str, form: str) -> None:
    qconfig: Any = OWN if form == "qconfig" else QConfigMapping().set_global(OWN)
    prepared = prepare(BUILDERS[mode][1](), mode=mode, qconfig=qconfig)
    kinds = {type(child) for _, child in fake_quantizes(prepared)}
    assert kinds == {FakeQuantize}
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.qconfig.startswith("sha256:")
    assert set(recipe.grid.values()) == {
        "min_max per_tensor_affine quint8 [0, 127]",
        "min_max_per_channel per_channel_symmetric qint8 [-128, 127]",
    }
    train_steps(prepared, ((images(),), {}))
    assert torch.isfinite(convert(prepared)(images())).all()


def test_a_mapping_may_keep_a_layer_float() -> None:
    mapping = QConfigMapping().set_global(OWN).set_module_name("fc", None)
    prepared = prepare(Residual(), qconfig=mapping)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("stem.0", "block.0")


def test_a_mapping_given_stays_as_it_was() -> None:
    mapping = QConfigMapping().set_global(OWN)
    before = copy.deepcopy(mapping.to_dict())
    prepare(Residual(), qconfig=mapping, keep_float=["fc"])
    assert str(mapping.to_dict()) == str(before)


def test_an_embedding_stays_float() -> None:
    prepared = prepare(Embedded())
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("fc",)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_prepared_keeps_mode_output_structure_and_parameters(case: Case, training: bool) -> None:
    torch.manual_seed(0)
    network = case.build().train(training)
    parameters = dict(network.named_parameters())
    args, kwargs = case.inputs()
    reference = copy.deepcopy(network)(*args, **kwargs)
    prepared = prepare(network, mode=case.mode)
    assert prepared.training is training
    output = prepared(*args, **kwargs)
    assert type(output) is type(reference)
    assert [leaf.shape for leaf in leaves(output)] == [leaf.shape for leaf in leaves(reference)]
    ours = {id(p) for p in prepared.parameters()}
    assert ours == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prepared_copy_is_independent(case: Case) -> None:
    prepared = prepare(case.build(), mode=case.mode)
    twin = copy.deepcopy(prepared)
    assert same_state(prepared, twin) == []
    inputs = case.inputs()
    train_steps(prepared, inputs)
    assert same_state(prepared, twin) != []
    twin.load_state_dict(prepared.state_dict())
    twin.eval()
    args, kwargs = inputs
    for ours, theirs in zip(leaves(prepared(*args, **kwargs)), leaves(twin(*args, **kwargs)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_warning_reaches_the_user(case: Case) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare(case.build(), mode=case.mode)
        train_steps(prepared, case.inputs())
        args, kwargs = case.inputs()
        convert(prepared)(*args, **kwargs)
    assert [str(w.message) for w in caught] == []


def test_a_qconfig_without_fake_quantization_is_refused() -> None:
    """A post-training qconfig holds observers without rounding: nothing would be trained for int8."""
    mapping = get_default_qconfig_mapping("x86")
    with pytest.raises(ValueError, match="Nothing is left to quantize"):
        prepare(Residual(), qconfig=mapping)
    with quiet_torch_ao():
        qconfig = get_default_qat_qconfig("x86")
    assert len(names_of(prepare(Residual(), qconfig=qconfig))) == len(names_of(prepare(Residual())))
