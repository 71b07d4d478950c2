"""What a graph cannot do is refused, or kept as it was: never silently something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qat_lightning import (
    GuardError,
    QuantizationAwareTraining,
    UntraceableError,
    convert,
    export_onnx,
    load_int8,
    prepare,
)
from qat_lightning.base.sqnr import sqnr
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.trace.tracing import trace
from qat_lightning.quantize.floating import is_int8
from tests.networks import Residual, images
from tests.runs import TinyModule, trainer


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)
        self.calls = 0

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class OptionalMask(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        y = self.features(x)
        y = y * 3 if mask is None else y * mask
        return self.head(y * 2 if double else y)


class Counting(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.features(x)) * self.calls


class Drawing(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y if random.random() < 0.5 else y * 2)


class Averaging(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.mean = self.mean * 0.9 + y.detach().mean(0) * 0.1
        return self.head(y)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


def test_optional_arguments_take_the_path_of_their_default() -> None:
    network = OptionalMask().eval()
    x = images(4)
    expected = network(x)
    prepared = prepare(network).eval()
    set_enabled(prepared, observer=True, fake_quant=False)
    torch.testing.assert_close(prepared(x), expected)
    torch.testing.assert_close(prepared(x, mask=None, double=False), expected)
    with pytest.raises(GuardError, match=r"mask=None, but it is called with mask=a Tensor.*example_inputs"):
        prepared(x, mask=torch.ones(8))
    with pytest.raises(GuardError, match="double=False, but it is called with double=True"):
        prepared(x, double=True)
    prepared.train()(x)
    assert convert(prepared)(x).shape == (4, 10)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Counting, "assigns to 'calls'"), (Averaging, "assigns to 'mean'"), (Drawing, "random")],
)
def test_state_and_randomness_in_forward_are_refused(kind: type[nn.Module], message: str) -> None:
    network: Any = kind()
    with pytest.raises(UntraceableError, match=message):
        prepare(network)
    assert network.calls == 0
    assert all(type(buffer) is Tensor for buffer in network.buffers())


def test_tracing_leaves_the_random_state_alone() -> None:
    network = Residual()
    before = torch.get_rng_state(), random.getstate()
    trace(network)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_forward_hooks_are_refused() -> None:
    network = Residual()
    handle = network.fc.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="'fc' has a forward hook"):
        prepare(network)
    handle.remove()
    prepare(network)


def test_parametrized_weights_are_refused() -> None:
    network = Residual()
    parametrizations.weight_norm(network.fc)
    with pytest.raises(ValueError, match="remove_parametrizations"):
        prepare(network)


class CheckedAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert len(query) > 0
        return super().forward(query, *args, **kwargs)


def test_layers_inside_whole_modules_stay_float(tmp_path: Path) -> None:
    network = Transformer()
    network.encoder.self_attn = CheckedAttention(8, 2, batch_first=True)
    prepared = prepare(network, backend="onednn", untraceable="float").train()
    x = torch.randn(4, 3, 16, 16)
    prepared(x)
    int8: Any = convert(prepared)
    attention = int8.encoder.self_attn
    assert type(attention) is CheckedAttention
    assert type(attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert is_int8(int8.encoder.linear1)
    prepared.eval()
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 30
        export_onnx(prepared, tmp_path / "a.onnx", (x,))


def test_what_forward_does_not_use_stays_on_the_network() -> None:
    class Temperature(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("mean", torch.ones(3))
            self.extra = nn.Linear(4, 2)

    network = Temperature()
    names = set(network.state_dict())
    prepared: Any = prepare(network).train()
    assert {"temperature", "mean", "extra.weight", "extra.bias"} <= set(prepared.state_dict()) & names
    assert any(p is network.temperature for p in prepared.parameters())
    prepared(images(4))
    int8: Any = convert(prepared)
    assert int8.temperature.item() == 2.0
    assert int8.extra(torch.randn(1, 4)).shape == (1, 2)


def test_compiled_network_is_refused() -> None:
    with pytest.raises(ValueError, match="is compiled"):
        prepare(torch.compile(Residual(), backend="eager"))  # type: ignore[arg-type]


def test_a_lightning_module_is_prepared_as_the_object_it_is() -> None:
    module = TinyModule()
    assert prepare(module) is module
    assert isinstance(module, TinyModule)


@pytest.mark.parametrize("modules", [[], ["model", "model"]])
def test_modules_names_each_once(modules: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one submodule, each once"):
        QuantizationAwareTraining(modules=modules)


def test_double_precision_is_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="need float32 weights"):
        trainer(tmp_path, QuantizationAwareTraining(), precision="64-true", max_epochs=1).fit(TinyModule())


def test_another_schedule_on_resume_is_said_to_have_no_effect(tmp_path: Path) -> None:
    once = {"enable_checkpointing": False}
    first = trainer(tmp_path, QuantizationAwareTraining(freeze_observers_at=1), **once, max_epochs=2)
    first.fit(TinyModule())
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    again = QuantizationAwareTraining(freeze_observers_at=3)
    with pytest.warns(UserWarning, match="has no effect"):
        trainer(tmp_path, again, **once, max_epochs=3).fit(TinyModule(), ckpt_path=path)


def test_qnnpack_adds_a_branch_that_starts_at_zero() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8)
            nn.init.zeros_(self.bn.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return (x + self.bn(self.second(x))).relu()

    prepared = prepare(Branch(), backend="qnnpack").train()
    x = torch.randn(4, 3, 8, 8)
    prepared(x)
    with torch.no_grad():
        assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 30


def test_a_text_file_is_no_int8_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("import this")
    with pytest.raises(ValueError, match="cannot be read"):
        load_int8(path, Residual(), verify=False)
