"""A question that is answered by an error leaves the network, and the process, as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig
from torch.nn import functional as F
from torchvision.models import quantization as quantizable

from qat_lightning import (
    PreflightError,
    QuantizationAwareTraining,
    keep_for_target,
    preflight,
    prepare,
    sensitivity,
)
from qat_lightning.base import random_state
from qat_lightning.modes import ModeResult, Options
from qat_lightning.modes.eager.mode import EagerMode
from qat_lightning.quantize.networks import prepare_module
from qat_lightning.quantize.options import Settings
from tests.networks import CASES, Case, Nested, Residual, Stubbed, images
from tests.runs import TinyModule, trainer
from tests.test_lightning_modules import Loose

MISTAKES: dict[str, dict[str, Any]] = {
    "function": {"keep_float": ["torch.matmull()"]},
    "name": {"keep_float": ["no.such.layer"]},
    "override": {"overrides": {"no.such.layer": None}},
    "nothing left": {"keep_float": [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention]},
    "backend": {"backend": "x68"},
    "groups": {"fuse": [["no.such.layer", "relu"]]},
    "mode": {"mode": "eager"},
}


def snapshot(network: nn.Module) -> list[Any]:
    """Everything that a caller could see: objects by their identity, tensors by their bits, too."""
    seen: list[Any] = []
    for name, module in network.named_modules(remove_duplicate=False):
        seen.append((name, id(module), type(module), module.training, type(module).forward))
        for key, value in vars(module).items():
            seen.append((name, key, id(value), _content(value)))
    seen += [(key, _content(value)) for key, value in network.state_dict().items()]
    return seen


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value._version, value.requires_grad, value.detach().flatten().tolist()
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    if isinstance(value, list | tuple | set):
        return [id(each) for each in value]
    return repr(value) if isinstance(value, bool | int | float | str) else None


def asked(network: nn.Module, question: Callable[[], Any]) -> Exception | None:
    """The error that answers a question, after which nothing is another than before it."""
    before, random_before = snapshot(network), random_state.capture()
    try:
        question()
    except Exception as error:
        after = snapshot(network)
        assert after == before, next(pair for pair in zip(after, before, strict=False) if pair[0] != pair[1])
        assert random_state.same_state(random_state.capture(), random_before)
        return error
    return None


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_refused_network_is_as_it_was(case: Case, mistake: str) -> None:
    network = case.build()
    options = {"mode": case.mode, **MISTAKES[mistake]}
    if options["mode"] == "eager" and case.mode == "fx" and mistake != "mode":
        options["mode"] = "fx"
    error = asked(network, lambda: prepare(network, **options))
    if mistake in ("function", "name", "override", "nothing left", "backend", "groups"):
        assert isinstance(error, ValueError)


class Unlucky(nn.Module):
    """Fails while it is traced, after layers that were traced already."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.bn(self.conv(x)), 0.1, self.training).mean((2, 3))
        if self.kind == "value" and x.sum() > 0:
            x = -x
        if self.kind == "state":
            self.calls += 1
        if self.kind == "random":
            x = x * torch.rand(1)
        if self.kind == "layer" and not self.training:
            return self.fc(self.drop(x)) + self.fc(x)
        return self.fc(x)


@pytest.mark.parametrize("kind", ["value", "state", "random", "layer"])
@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_traced_is_as_it_was(kind: str, training: bool) -> None:
    network, x = Unlucky(kind).train(training), images(2)
    assert asked(network, lambda: prepare(network)) is not None
    before = snapshot(network)
    if kind in ("value", "random"):  # an example decides the path, and shows what is drawn anew
        with suppress(PreflightError):
            preflight(network, x)
        assert snapshot(network) == before
    else:
        assert asked(network, lambda: preflight(network, x)) is not None


def test_a_norm_of_timm_is_as_it_was() -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=4)
    assert isinstance(asked(network, lambda: prepare(network, keep_float=["F.batch_norn()"])), ValueError)


@pytest.mark.parametrize("build", [lambda: TinyModule(Nested()), lambda: TinyModule(Stubbed()), Loose])
def test_a_module_whose_run_is_refused_is_as_it_was(tmp_path: Path, build: Any) -> None:
    module = build()
    before = without_trainer(module)
    qat = QuantizationAwareTraining(keep_float=["no.such.layer"])
    with pytest.raises(ValueError, match=r"no\.such\.layer"):
        trainer(tmp_path, qat, max_epochs=1, logger=False, enable_checkpointing=False).fit(module)
    assert without_trainer(module) == before


def without_trainer(module: nn.Module) -> list[Any]:
    """A snapshot without the attributes in which Lightning and its metrics note what the Trainer is like."""
    kept = ("_modules", "_parameters", "_buffers")
    return [each for each in snapshot(module) if len(each) != 4 or each[1] in kept or each[1][0] != "_"]


class Pair(TinyModule):
    def __init__(self) -> None:
        super().__init__(Residual())
        self.second = Unlucky("value")


def test_a_second_network_that_fails_leaves_the_first_float(tmp_path: Path) -> None:
    module = Pair()
    first = snapshot(module.model)
    with pytest.raises(ValueError, match="cannot trace"):
        trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1).fit(module)
    assert snapshot(module.model) == first


def test_other_questions() -> None:
    network = Residual()
    loader = [(images(4), torch.zeros(4, dtype=torch.long))]
    wrong: dict[str, Any] = {"keep_float": ["torch.matmull()"]}
    x = images(2)
    assert asked(network, lambda: preflight(network, x, **wrong)) is not None
    assert asked(network, lambda: sensitivity(network, loader, **wrong)) is not None
    assert asked(network, lambda: keep_for_target(network, loader, lambda y, b: 0.5, **wrong)) is not None


def test_prepare_shares_parameters_and_leaves_the_original_usable() -> None:
    network = Residual().eval()
    x = images(2)
    expected = network(x)
    keys = list(network.state_dict())
    prepared = prepare(network)
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in network.parameters()}
    assert list(network.state_dict()) == keys
    assert torch.equal(network(x), expected)


ENGINES: list[str] = []


class NotesEngine(Residual):
    def forward(self, x: Tensor) -> Tensor:
        ENGINES.append(torch.backends.quantized.engine)
        return super().forward(x)


@pytest.mark.parametrize(
    "ask", [prepare, lambda network, **options: preflight(network, images(4), **options)]
)
def test_the_engine_of_the_process_stays_while_a_network_is_traced(ask: Callable[..., Any]) -> None:
    ENGINES.clear()
    ask(NotesEngine(), backend="qnnpack")
    assert torch.backends.quantized.engine != "qnnpack"
    assert set(ENGINES) == {torch.backends.quantized.engine}


class StubbedPair(TinyModule):
    def __init__(self) -> None:
        super().__init__(Stubbed())
        self.second = Stubbed()


def test_each_of_several_networks_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    once = EagerMode.prepare

    def counted(self: EagerMode, network: nn.Module, options: Options) -> ModeResult:
        calls.append(network)
        return once(self, network, options)

    monkeypatch.setattr(EagerMode, "prepare", counted)
    module = StubbedPair()
    prepare_module(module, Settings())
    assert calls[2:] == [module.model, module.second]
    assert not {*calls[:2]} & {module.model, module.second}


class Gone(Stubbed):
    """Fails to be fused, after the first network was prepared."""

    def fuse_model(self, is_qat: bool = True) -> None:
        raise ValueError("no such layer")


def test_a_second_network_that_fails_leaves_an_eager_one_float(tmp_path: Path) -> None:
    module = StubbedPair()
    module.second = Gone()
    before = snapshot(module.model), snapshot(module.second)
    with pytest.raises(ValueError, match="no such layer"):
        trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1).fit(module)
    assert (snapshot(module.model), snapshot(module.second)) == before


def test_a_qconfig_that_is_refused_changes_nothing() -> None:
    network = Stubbed()
    broken = QConfig(activation=nn.Identity, weight=nn.Identity)
    asked(network, lambda: prepare(network, qconfig=broken))


@pytest.mark.slow
def test_threads_do_not_see_each_other() -> None:
    """One prepares in fx and in eager mode; the others infer, normalize, and prepare as well."""
    function, call, read = F.batch_norm, nn.Module.__call__, nn.Module.__getattr__
    stop, errors = threading.Event(), []
    reference = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = reference(x)
    mean, var = torch.zeros(3), torch.ones(3)

    def repeat(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                errors.append(error)

        return run

    def infer() -> None:
        with torch.no_grad():
            assert torch.equal(reference(x), expected)

    def normalize() -> None:
        assert F.batch_norm is function
        torch.testing.assert_close(F.batch_norm(x, mean, var, eps=0.0), x)

    def prepare_another() -> None:
        prepare(others.pop())

    networks = [timm.create_model("mobilenetv3_small_050", num_classes=4) for _ in range(2)]
    networks += [quantizable.mobilenet_v2(weights=None, quantize=False) for _ in range(2)]
    others = [Residual() for _ in range(1000)]  # made before: a trace refuses random numbers, whoever draws
    threads = [threading.Thread(target=repeat(work)) for work in (infer, normalize, prepare_another)]
    for thread in threads:
        thread.start()
    try:
        for network in networks:
            prepare(network)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    assert (F.batch_norm, nn.Module.__call__, nn.Module.__getattr__) == (function, call, read)
