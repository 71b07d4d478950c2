"""How the steps are computed: precision, several optimizers, compilation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.run import trainer_facts
from tests.compatibility.registry import Section
from tests.compatibility.runs import STEPS, Phases, check, fit, outputs, refused
from tests.networks import Stubbed
from tests.runs import TinyModule, trainer

row = Section("Computation")


class Dtypes(pl.Callback):
    """Remembers in which dtypes the network's first layer computed."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layer = pl_module.get_submodule("model.stem.0")
        layer.register_forward_hook(lambda module, args, output: self.seen.add(output.dtype))


def train_in(folder: Path, precision: Any) -> set[torch.dtype]:
    dtypes = Dtypes()
    run = fit(folder, dtypes, precision=precision)
    child: Any
    for name, child in fake_quantizes(run.module):
        assert child.scale.dtype == torch.float32, name
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}
    check(run)
    return dtypes.seen


@row("precision", 'Trainer(precision="32-true")', "works; the default")
def precision_32(folder: Path) -> None:
    assert train_in(folder, "32-true") == {torch.float32}


@row("precision", 'Trainer(precision="bf16-mixed")', "works; fake-quantization computes in float32")
def precision_bf16_mixed(folder: Path) -> None:
    assert torch.bfloat16 in train_in(folder, "bf16-mixed")


@row(
    "precision",
    'Trainer(precision="16-mixed")',
    "works; on a CPU Lightning uses bf16-mixed instead, and warns",
)
def precision_16_mixed(folder: Path) -> None:
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        assert torch.bfloat16 in train_in(folder, "16-mixed")


@row(
    "precision",
    'Trainer(precision="bf16-true"), "16-true", "64-true"',
    "refused: ranges and conversion need float32 weights",
)
def precision_true(folder: Path) -> None:
    for precision in ("bf16-true", "64-true"):
        match = f"need float32 weights, but precision is '{precision}'.*Use '32-true'"
        refused(folder, match, precision=precision, error=MisconfigurationException)


class Adversaries(TinyModule):
    """Two networks, two optimizers, stepped by hand in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.model(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.model, self.other)]


@row(
    "Manual optimization",
    "automatic_optimization = False, two optimizers",
    "works; fractions refer to batches, however often each optimizer steps",
)
def manual_optimization(folder: Path) -> None:
    phases = Phases()
    module = Adversaries()
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}
    run = fit(folder, phases, module=module, max_epochs=4)
    assert run.trainer.global_step == 2 * 4 * STEPS
    assert [phase.observe for phase in phases.seen] == [True] * 2 * STEPS + [False] * 2 * STEPS
    for name, value in before.items():
        assert not torch.equal(value, run.module.get_parameter(name)), name
    assert [prepared.name for prepared in run.qat._prepared] == ["model", "other"]
    check(run)


class Unlogged(TinyModule):
    """Logs nothing, which would break the compiled graph."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        return self(batch[0])


@row(
    "torch.compile",
    "trainer.fit(torch.compile(module))",
    "works, without the preflight; int8 is not compiled",
)
def compiled_module(folder: Path) -> None:
    compiled = torch.compile(Unlogged(), backend="eager")
    run = fit(folder, module=compiled)
    assert run.module._compiler_ctx is not None
    assert run.qat.int8_module is not None
    assert run.qat.int8_module._compiler_ctx is None
    check(run)
    before = outputs(run.qat.int8_module)
    nn.init.zeros_(run.module.get_parameter("model.fc.weight"))
    assert torch.equal(
        outputs(run.qat.int8_module), before
    )  # which the int8 network computes, not the trained


class CompiledLater(Unlogged):
    """Compiles its network once it is prepared."""

    def on_fit_start(self) -> None:
        self.model.compile(backend="eager")


@row("torch.compile", "self.model.compile() in on_fit_start", "works, likewise")
def compiled_network(folder: Path) -> None:
    run = fit(folder, module=CompiledLater)
    assert run.module.get_submodule("model")._compiled_call_impl is not None
    check(run)


class CompiledInPieces(Unlogged):
    """Compiles its network but for the fake-quantizes, as Dynamo does where it gives up on one."""

    def on_fit_start(self) -> None:
        self.model.compile(backend="eager")
        self.forward_of_grids = FakeQuantize.forward  # of the class: a copy of an instance's would be bound
        FakeQuantize.forward = torch.compiler.disable(FakeQuantize.forward)  # type: ignore[method-assign]

    def on_fit_end(self) -> None:
        FakeQuantize.forward = self.forward_of_grids  # type: ignore[method-assign]


@row("torch.compile", "the same, where Dynamo leaves parts of the network uncompiled", "works, likewise")
def compiled_in_pieces(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)  # Dynamo, at a graph break
        check(fit(folder, module=CompiledInPieces(Stubbed())))


@row(
    "torch.compile",
    "self.model = torch.compile(model), or model.compile(), in __init__",
    "refused: a compiled network cannot be prepared",
)
def compiled_too_early(folder: Path) -> None:
    wrapped, in_place, eager = TinyModule(), TinyModule(), TinyModule(Stubbed())
    wrapped.model = torch.compile(wrapped.model, backend="eager")  # type: ignore[assignment]
    in_place.model.compile(backend="eager")
    eager.model.compile(backend="eager")
    for module in (wrapped, in_place, eager):
        refused(folder, "network is compiled.*compile in the", module=module, error=ValueError)


@row(
    "Strategies that shard",
    'Trainer(strategy="fsdp"), "deepspeed", "tensor parallel"',
    "refused: every rank needs every parameter whole",
)
def sharded(folder: Path) -> None:
    runner = trainer(folder)
    runner.strategy.__class__ = FSDPStrategy  # it takes a GPU to make one
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy shards them.*Use strategy='ddp'"):
        trainer_facts.check_strategy(runner)
