"""What searches, freezes or prunes around a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder, ModelPruning
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.compatibility.registry import Section
from tests.compatibility.runs import Run, Weights, callback, check, check_same, fit, refused
from tests.networks import CLASSES, SIZE, ConvBnRelu
from tests.runs import TinyModule, loader, trainer

row = Section("Searching, finetuning, pruning")


class Sized(TinyModule):
    """Makes batches of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=True, batch_size=self.batch_size)


class WithBackbone(TinyModule):
    """A backbone and a head, both networks of the LightningModule."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(8 * SIZE * SIZE, CLASSES)))
        self.backbone = ConvBnRelu()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.backbone(x))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr)


@row(
    "LearningRateFinder",
    "LearningRateFinder()",
    "works; it restores weights, ranges and random state afterwards, bit for bit",
)
def learning_rate_finder(folder: Path) -> None:
    plain = fit(folder)
    for place in ("before", "after"):
        finder = LearningRateFinder(num_training_steps=15, update_attr=False, early_stop_threshold=None)
        run = fit(folder, before=(finder,)) if place == "before" else fit(folder, finder)
        assert finder.optimal_lr is not None
        losses = torch.tensor(finder.optimal_lr.results["loss"])
        assert losses.isfinite().all()
        assert losses.unique().numel() > 10  # it trained
        check_same(run, plain)
    check(run)


@row(
    "LearningRateFinder",
    "LearningRateFinder(update_attr=True)",
    "works; the run trains with the rate that was found",
)
def learning_rate_finder_updates(folder: Path) -> None:
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-3, early_stop_threshold=None)
    run = fit(folder, finder, max_epochs=4)
    assert finder.optimal_lr is not None
    assert run.module.lr == finder.optimal_lr.suggestion() == run.trainer.optimizers[0].param_groups[0]["lr"]
    check(run)


class Seed(pl.Callback):
    """Makes what follows the preparation, which draws random numbers, the same."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.manual_seed(2)


@row(
    "Tuner",
    "Tuner(trainer).lr_find(module)",
    "works; it prepares the module, converts nothing, and fit continues",
)
def tuner(folder: Path) -> None:
    qat = callback()
    torch.manual_seed(0)
    module = TinyModule()
    runner = trainer(folder, qat, Seed(), max_epochs=2, enable_checkpointing=False)
    Tuner(runner).lr_find(module, num_training=15, update_attr=False)
    assert qat.int8_module is None
    assert not list(folder.rglob("int8.pt"))
    runner.fit(module)
    check_same(Run(runner, module, qat), fit(folder, Seed()))
    check(Run(runner, module, qat))


@row("BatchSizeFinder", "BatchSizeFinder()", "works; it restores everything afterwards, bit for bit")
def batch_size_finder(folder: Path) -> None:
    plain = fit(folder, module=Sized)
    same = fit(folder, BatchSizeFinder(init_val=4, max_val=8), module=Sized)
    assert same.module.batch_size == 8
    check_same(same, plain)
    larger = fit(folder, BatchSizeFinder(init_val=8, max_val=16), module=Sized)
    assert larger.trainer.global_step == 2 * 3
    check(larger)


@row(
    "BackboneFinetuning",
    "callbacks=[qat, BackboneFinetuning(10)]",
    "works, before and after the callback; the prepared backbone freezes and thaws like the float one",
)
def backbone_finetuning(folder: Path) -> None:
    for place in ("before", "after"):
        weights, finetuning = Weights(), BackboneFinetuning(2, lambda epoch: 1.0, train_bn=False)
        first, others = ((finetuning,), ()) if place == "before" else ((), (finetuning,))
        run = fit(folder, *others, weights, module=WithBackbone, before=first, max_epochs=4)
        start, _, thawed, _ = (epoch["backbone.conv.weight"] for epoch in weights.epochs)
        assert torch.equal(start, thawed)
        assert not torch.equal(thawed, run.module.get_parameter("backbone.conv.weight"))
        assert not torch.equal(weights.epochs[0]["model.1.weight"], weights.epochs[1]["model.1.weight"])
        check(run)


class KeepZeros(pl.Callback):
    """Gives a weight that is zero a gradient of zero."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.ndim > 1:
                kept = parameter != 0
                parameter.register_hook(lambda grad, kept=kept: grad * kept)


@row(
    "ModelPruning before",
    "ModelPruning in a float run, then fit with qat",
    "works; zeros stay zeros in int8 if their gradient is masked: "
    "`parameter.register_hook(lambda grad, kept=parameter != 0: grad * kept)`",
)
def pruning_before(folder: Path) -> None:
    module = TinyModule()
    layers = [(m, "weight") for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    options: dict[str, Any] = {"amount": 0.5, "use_global_unstructured": False}
    pruning = ModelPruning("l1_unstructured", layers, apply_pruning=lambda epoch: epoch == 0, **options)
    trainer(folder, pruning, max_epochs=2, enable_checkpointing=False).fit(module)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}
    zeros = {name: weight == 0 for name, weight in weights.items()}
    assert all(0.4 < zero.float().mean() < 0.6 for zero in zeros.values())
    run = fit(folder, KeepZeros(), module=module)
    assert run.qat.int8_module is not None
    for name, zero in zeros.items():
        layer: Any = run.qat.int8_module.get_submodule(name.removesuffix(".weight"))
        assert not layer.weight[zero].any(), name
        assert layer.weight[~zero].any(), name
    check(run)


@row(
    "ModelPruning during",
    "callbacks=[qat, ModelPruning(...)]",
    "refused: it skips every convolution that is fused with its batch-norm",
)
def pruning_during(folder: Path) -> None:
    match = "ModelPruning skips containers, and takes every convolution.*Prune in a float run"
    refused(folder, match, ModelPruning("l1_unstructured", amount=0.5), error=MisconfigurationException)
