"""What the teacher is: a frozen copy that no checkpoint, optimizer, graph or process can lose or change."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import Distillation, QuantizationAwareTraining
from qat_lightning.run.parts.distillation import METRIC, Teaching
from tests.networks import CLASSES, Residual, Stubbed, same_state
from tests.processes import run_all
from tests.runs import TinyModule, dataset, trainer
from tests.test_distillation import NoDropout, first_gradients, networks
from tests.test_lightning_modules import Loose
from tests.test_resume import EPOCHS, STEPS, Crash, CrashAt, Noisy, seed

# What the teacher is


def teachers_of(qat: QuantizationAwareTraining) -> dict[nn.Module, nn.Module]:
    """The teacher of each network that learns."""
    return next(part for part in qat._parts if isinstance(part, Teaching))._teachers


def listeners(module: nn.Module) -> list[Any]:
    """The hooks on `module` and its parts that are a distillation's."""
    found = [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in module.modules()]
    hooks = itertools.chain.from_iterable(found)
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Distillation)]


class NoTrace(pl.Callback):
    """After each batch nothing listens, and the optimizer has the module's own parameters."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert not listeners(pl_module)
        known = {p for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        assert known == set(pl_module.parameters())


@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_the_float_network_teaches_and_stays_as_it_was(tmp_path: Path, network: type[nn.Module]) -> None:
    module = TinyModule(network())
    before = copy.deepcopy(module.model)
    qat = QuantizationAwareTraining(distillation=Distillation("self"), export=["torch"])
    trainer(tmp_path, qat, NoTrace(), max_epochs=2).fit(module)
    (teacher,) = teachers_of(qat).values()
    assert same_state(before, teacher) == []
    assert not teacher.training
    assert teacher is not module.model
    assert qat.int8_module is not None
    assert not listeners(qat.int8_module)


def test_it_is_in_no_checkpoint(tmp_path: Path) -> None:
    sizes, keys = [], []
    for name, teacher in (("without", None), ("with", "self")):
        torch.manual_seed(0)
        qat = QuantizationAwareTraining(distillation=Distillation(teacher), convert=None)
        saved = ModelCheckpoint(tmp_path / name, filename="last")
        trainer(tmp_path, qat, saved, max_epochs=1).fit(TinyModule(Residual(64)))
        sizes.append((tmp_path / name / "last.ckpt").stat().st_size)
        keys.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"].keys())
    assert keys[0] == keys[1]
    assert abs(sizes[1] - sizes[0]) < 4096  # the teacher's weights are 150 kB


def test_a_given_teacher_is_not_modified(tmp_path: Path) -> None:
    teacher = Residual().train()
    before = copy.deepcopy(teacher)
    qat = QuantizationAwareTraining(distillation=Distillation(teacher), convert=None)
    trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    assert same_state(before, teacher) == []
    assert teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for m in teacher.modules())


class Drawing(Residual):
    """Draws even in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_random_states_are_untouched(tmp_path: Path) -> None:
    states = []
    for teacher in (None, Drawing()):
        seed()
        qat = QuantizationAwareTraining(distillation=Distillation(teacher), convert=None)
        trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(Noisy())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_it_learns_what_the_teacher_says(tmp_path: Path) -> None:
    """Without labels: the student of a teacher that knows the classes knows them too."""

    class Unlabelled(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * self(batch[0]).sum()

    teacher = TinyModule(NoDropout())
    trainer(tmp_path, max_epochs=6, enable_checkpointing=False).fit(teacher)
    module = Unlabelled(NoDropout())
    qat = QuantizationAwareTraining(distillation=Distillation(teacher.model), convert=None)
    runner = trainer(tmp_path, qat, max_epochs=12, enable_checkpointing=False)
    runner.fit(module)
    (found,) = runner.test(module, verbose=False)
    (known,) = runner.test(teacher, verbose=False)
    assert known["test_accuracy"] > 0.6
    assert found["test_accuracy"] > known["test_accuracy"] - 0.2


def test_a_second_fit_has_the_same_teacher(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(distillation=Distillation("self"), convert=None)
    module = TinyModule()
    before = copy.deepcopy(module.model)
    for _ in range(2):
        trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
        (teacher,) = teachers_of(qat).values()
        assert same_state(before, teacher) == []
    other = TinyModule(Residual(4))
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(other)
    assert next(iter(teachers_of(qat))) is other.model
    with pytest.raises(ValueError, match="'model' is prepared already"):
        trainer(tmp_path, QuantizationAwareTraining(distillation=Distillation("self")), max_epochs=1).fit(
            other
        )


@pytest.mark.parametrize("first", [True, False])
def test_a_finder_of_learning_rates_restores_what_it_saved(tmp_path: Path, first: bool) -> None:
    finder = LearningRateFinder(num_training_steps=8)
    qat = QuantizationAwareTraining(distillation=Distillation("self"), convert=None)
    callbacks = [finder, qat] if first else [qat, finder]
    runner = trainer(tmp_path, *callbacks, max_epochs=1)
    runner.fit(TinyModule())
    assert runner.callback_metrics[METRIC] > 0


def test_a_module_with_layers_of_its_own(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(distillation=Distillation("self"))
    runner = trainer(tmp_path, qat, max_epochs=1)
    runner.fit(Loose())
    assert runner.callback_metrics[METRIC] > 0


class Heads(nn.Module):
    """A tuple of main and auxiliary logits in training, the main ones in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = NoDropout(), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return x, self.aux(x)


class FirstOf(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_the_first_of_a_tuple_is_the_logits(tmp_path: Path) -> None:
    runner = trainer(
        tmp_path,
        QuantizationAwareTraining(distillation=Distillation(NoDropout()), convert=None),
        max_epochs=1,
    )
    runner.fit(FirstOf(Heads()))
    assert runner.callback_metrics[METRIC] > 0


class Pair(TinyModule):
    """Two networks, each with logits."""

    def __init__(self) -> None:
        super().__init__(NoDropout())
        self.second = NoDropout()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y) + F.cross_entropy(self.second(x), y)


@pytest.mark.parametrize("teacher", ["self", {"second": "self"}, {"second": NoDropout(), "model": "self"}])
def test_several_networks(tmp_path: Path, teacher: Any) -> None:
    qat = QuantizationAwareTraining(distillation=Distillation(teacher), convert=None)
    runner = trainer(tmp_path, qat, max_epochs=1)
    module = Pair()
    runner.fit(module)
    expected = {module.model, module.second} if teacher == "self" else {getattr(module, n) for n in teacher}
    assert set(teachers_of(qat)) == expected
    assert runner.callback_metrics[METRIC] > 0


def test_mobilenet_v3_learns_from_itself(tmp_path: Path) -> None:
    class Small(TinyModule):
        def train_dataloader(self) -> DataLoader[Any]:
            images = F.interpolate(dataset(16).tensors[0], 64)
            return DataLoader(TensorDataset(images, dataset(16).tensors[1]), batch_size=8)

        val_dataloader = train_dataloader

    module = Small(torchvision.models.mobilenet_v3_small(num_classes=CLASSES), lr=0.01)
    before = copy.deepcopy(module.model)
    qat = QuantizationAwareTraining(distillation=Distillation("self"), preflight=False)
    runner = trainer(tmp_path, qat, max_epochs=2)
    runner.fit(module)
    (teacher,) = teachers_of(qat).values()
    assert same_state(before, teacher) == []
    assert runner.callback_metrics[METRIC].isfinite()
    assert qat.int8_module is not None


# Resume


def resumable(folder: Path, build: Callable[[], TinyModule], *extra: Any, **options: Any) -> TinyModule:
    qat = QuantizationAwareTraining(convert=None, distillation=options.pop("distillation", Distillation()))
    saved = ModelCheckpoint(folder / "ckpt", save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    module = build()
    trainer(folder, qat, saved, *extra, max_epochs=EPOCHS).fit(module, **options)
    return module


def start() -> TinyModule:
    """What qat-train does with `weights=…`: the same ones at every start."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Noisy(Residual())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resume_is_exact(tmp_path: Path) -> None:
    seed()
    whole = resumable(tmp_path / "whole", start)
    seed()
    with pytest.raises(Crash):
        resumable(tmp_path / "crashed", start, CrashAt(2 * STEPS + 2))
    torch.manual_seed(99)
    path = tmp_path / "crashed" / "ckpt" / "epoch=1.ckpt"
    resumed = resumable(tmp_path / "crashed", start, ckpt_path=path)
    assert same_state(whole, resumed) == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_resumed_run_with_another_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        resumable(tmp_path, start, CrashAt(STEPS + 2))
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    with pytest.raises(ValueError, match="continue with the teacher that it started with"):
        resumable(tmp_path, lambda: Noisy(Residual()), ckpt_path=path)
    for wrong in (None, Distillation(weight=2.0), Distillation(temperature=2.0)):
        with pytest.raises(ValueError, match="continue with the teacher that it started with"):
            resumable(tmp_path, start, ckpt_path=path, distillation=wrong)


# Several processes


class Shared(TinyModule):
    """Each process has its half of the images, whatever the sampler would give it."""

    share: int | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = dataset(32).tensors
        begin = self.global_rank if self.share is None else self.share
        return DataLoader(TensorDataset(x[begin::2], y[begin::2]), batch_size=8)


@pytest.mark.slow
def test_two_processes_have_the_mean_of_the_gradients(tmp_path: Path) -> None:
    run_all([(["-m", "tests.distillation_script", str(tmp_path)], {})], tmp_path)
    alone = []
    for share in range(2):
        student, teacher = networks()
        module = Shared(student)
        module.share = share
        alone.append(first_gradients(tmp_path, module, teacher)[0])
    for name in ("plain", "unused", "static"):
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        for key, gradient in ranks[0].items():
            assert torch.equal(gradient, ranks[1][key])
            mean = (alone[0][key] + alone[1][key]) / 2
            torch.testing.assert_close(gradient, mean, rtol=0, atol=2e-5 * float(mean.abs().max()), msg=key)
