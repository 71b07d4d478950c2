"""What this package has of its own behaves like its model in `torch.ao`, and the two accept each other."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import observer as torchs
from torch.nn import functional as F

from qat_lightning import FakeQuantize, QConfig, prepare
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.fake_quant.fixed import fixed_fake_quantize
from qat_lightning.fake_quant.observers import OBSERVERS, observer_name
from qat_lightning.fake_quant.switches import is_fake_quantize
from qat_lightning.modes.lowering.operations import OPERATIONS
from qat_lightning.modes.qconfig import default_qconfig, describe, qconfig_name
from qat_lightning.modes.targets.native import NATIVE
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import ConvBnRelu, Residual, Stubbed, images

PAIRS = {
    "moving_average": torchs.MovingAverageMinMaxObserver,
    "moving_average_per_channel": torchs.MovingAveragePerChannelMinMaxObserver,
    "min_max": torchs.MinMaxObserver,
    "min_max_per_channel": torchs.PerChannelMinMaxObserver,
}


def attributes(observer: nn.Module) -> dict[str, Any]:
    names = ("dtype", "qscheme", "quant_min", "quant_max", "ch_axis", "averaging_constant", "is_dynamic")
    return {name: getattr(observer, name) for name in names if hasattr(observer, name)}


def pair(name: str, **options: Any) -> tuple[FakeQuantize, FakeQuantize]:
    """A fake-quantize with our observer, and one with that of torch.ao."""
    ours, theirs = OBSERVERS[name], PAIRS[name]
    return FakeQuantize(ours, **options), FakeQuantize(theirs, **options)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "eps": 2**-12},
        {"reduce_range": True},
        {"factory_kwargs": {"dtype": torch.float64}},
    ],
)
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range")
def test_observers_are_alike(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, **options)
    assert attributes(ours.activation_post_process) == attributes(theirs.activation_post_process)
    assert describe(ours) == describe(theirs)
    assert describe(ours).startswith(f"{name} ")
    x = torch.randn(3, 4, 5)
    for scale in (1, 3, 0.5):
        assert torch.equal(ours(x * scale), theirs(x * scale))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
        assert value.dtype == theirs.state_dict()[key].dtype


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_fit_both(name: str) -> None:
    for one, other in (pair(name), pair(name)[::-1]):
        one(torch.randn(3, 4, 5))
        other.load_state_dict(one.state_dict())
        x = torch.randn(3, 4, 5)
        assert torch.equal(one.eval()(x), other.eval()(x))
        ours: Any = one.activation_post_process
        ours.reset_min_max_vals()
        assert ours.min_val.numel() == 0 or ours.min_val == torch.inf


def test_an_observer_of_neither_has_its_own_name() -> None:
    class Mine(torchs.MinMaxObserver):
        pass

    assert observer_name(Mine()) == f"{__name__}.{Mine.__qualname__}"
    assert observer_name(torchs.HistogramObserver()) == "histogram"


@pytest.mark.parametrize("observer", [torchs.HistogramObserver, torchs.MinMaxObserver.with_args(eps=0.1)])
def test_a_user_may_pass_the_observers_of_torch_ao(observer: Any) -> None:
    x = torch.randn(100)
    grid = FakeQuantize(observer)
    assert 0 < float((grid(x) - x).abs().max()) <= float(grid.scale)


def test_impossible_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.quint8 has no integers \[0, 300\]"):
        FakeQuantize(quant_max=300)
    with pytest.raises(ValueError, match=r"must include 0, but is \[3, 9\]"):
        FakeQuantize(quant_min=3, quant_max=9)


def test_fixed_qparams_round_like_torch_aos() -> None:
    ours = fixed_fake_quantize(1 / 256, 0)()
    constructor = ao.FixedQParamsObserver.with_args(scale=1 / 256, zero_point=0, quant_min=0, quant_max=255)
    theirs: Any = ao.FixedQParamsFakeQuantize(constructor)
    x = torch.linspace(-0.5, 1.5, 999)
    for change in (lambda m: m, lambda m: m.disable_fake_quant()):
        change(ours), change(theirs)
        assert torch.equal(ours(x), theirs(x))
        gradients = []
        for fake_quantize in (ours, theirs):
            fake_quantize(leaf := x.clone().requires_grad_()).square().sum().backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
    assert describe(ours) == describe(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("build", [Residual, Stubbed, lambda: nn.Sequential(ConvBnRelu(), nn.Sigmoid())])
def test_the_switches_of_torch_ao_work_in_a_prepared_network(build: Any) -> None:
    prepared = prepare(build())
    found: list[Any] = [child for _, child in fake_quantizes(prepared)]
    prepared.apply(ao.disable_observer).apply(ao.disable_fake_quant)
    assert found
    assert not any(bool(child.observer_enabled) or bool(child.fake_quant_enabled) for child in found)
    prepared.apply(ao.enable_observer).apply(ao.enable_fake_quant)
    assert all(bool(child.observer_enabled) and bool(child.fake_quant_enabled) for child in found)


def test_fake_quantizes_of_both_are_recognized() -> None:
    class Mine(ao.FakeQuantize):
        pass

    known = [FakeQuantize(), ao.FakeQuantize(), ao.FusedMovingAvgObsFakeQuantize(), Mine()]
    assert all(map(is_fake_quantize, known))
    assert not any(map(is_fake_quantize, [nn.Identity(), torchs.MinMaxObserver(), None]))


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_a_qconfig_may_be_ours_or_torch_aos(build: Any) -> None:
    ours = default_qconfig("onednn", "min_max")
    assert isinstance(ours, QConfig)
    theirs = ao.QConfig(*ours)
    assert qconfig_name(ours) == qconfig_name(theirs)
    recipes = [recipe_of(prepare(build(), backend="x86", qconfig=each)) for each in (ours, theirs)]
    assert recipes[0] == recipes[1]
    assert recipes[0] is not None
    assert "min_max per_tensor_affine quint8 [0, 255]" in recipes[0].grid.values()
    prepared: Any = prepare(build(), overrides={"fc": ours})
    assert prepared(images()).isfinite().all()


def test_constructors_are_like_torch_aos() -> None:
    made: Any = default_qconfig("x86").activation.with_args(quant_max=200)
    assert made().quant_max == 200
    assert made.with_callable_args(quant_max=lambda: 100)().quant_max == 100
    assert made.with_callable_args(quant_max=lambda: 100)(quant_max=50).quant_max == 50
    assert FakeQuantize.with_callable_args(quant_max=lambda: 9)().quant_max == 9
    assert pickle.loads(pickle.dumps(made))().quant_max == copy.deepcopy(made)().quant_max == 200
    assert "quant_max=200" in repr(made)


def test_fixed_qparams_are_those_of_pytorch() -> None:
    theirs: dict[Any, Any] = dict(ao.get_default_qat_qconfig_mapping("x86").object_type_qconfigs)
    fixed = {each: qconfig for each, qconfig in theirs.items() if "Fixed" in str(qconfig)}
    ours = {each: rule.fixed for each, rule in NATIVE.rules.items() if rule.fixed is not None}
    assert {*ours} - {F.sigmoid, F.tanh} == {*fixed} & {*NATIVE.rules} - {nn.Softmax}
    for operation, qparams in ours.items():
        if operation in fixed:
            expected, made = fixed[operation].activation(), fixed_fake_quantize(*qparams)()
            assert describe(made) == describe(expected)
            assert (made.scale, made.zero_point) == (expected.scale, expected.zero_point)


@pytest.mark.parametrize("kind", ["per_tensor", "per_channel"])
def test_operations_compute_like_quantized_decomposed(kind: str) -> None:
    x = torch.randn(4, 3, 5) * 3
    scales, zero_points = torch.rand(3) / 10, torch.tensor([0, 100, 255], dtype=torch.int32)
    qparams: Any = (scales, zero_points, 1) if kind == "per_channel" else (0.03, 100)
    found = []
    for operations in (OPERATIONS, torch.ops.quantized_decomposed):
        arguments = (*qparams, 0, 255, torch.uint8)
        integers = getattr(operations, f"quantize_{kind}")(x, *arguments)
        found.append((integers, getattr(operations, f"dequantize_{kind}")(integers, *arguments)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_pytorchs_own_qconfigs_are_still_there() -> None:
    with quiet_torch_ao():
        for build in (Residual, Stubbed):
            recipe = recipe_of(prepare(build(), qconfig="torch"))
            assert recipe is not None
            assert recipe.qconfig == "torch"
