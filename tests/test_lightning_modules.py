"""LightningModules whose layers are directly on them, in fx mode: they are traced and stay what they are."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning import (
    QuantizationAwareTraining,
    UntraceableError,
    convert,
    export_onnx,
    load_int8,
    load_qat_checkpoint,
    prepare,
    save_int8,
)
from qat_lightning.fake_quant.phases import freeze_bn_statistics, set_enabled
from qat_lightning.modes.lowering.reference import reference
from qat_lightning.quantize.floating import is_int8
from qat_lightning.quantize.recipe import quantized_networks, recipe_of
from tests.networks import CLASSES, ConvBnRelu, Residual, images, same_state, sqnr, train_steps
from tests.runs import TinyModule, dataset, trainer


class Loose(TinyModule):
    """Convolution, batch-norm and head on the module itself, a network that forward calls, and a metric."""

    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__(nn.Identity(), lr)
        del self.model
        self.save_hyperparameters()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(width, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.criterion = nn.CrossEntropyLoss()
        self.example_input_array = images(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.body(x) + x * self.scale
        return self.fc(F.dropout(x.mean((2, 3)), 0.1, self.training))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("val_loss", self.criterion(logits, batch[1]))


def fit(
    folder: Path, module: pl.LightningModule, epochs: int = 4, **options: Any
) -> QuantizationAwareTraining:
    qat = QuantizationAwareTraining(**{"backend": "onednn", **options})
    trainer(folder, qat, max_epochs=epochs, enable_checkpointing=False).fit(module)
    return qat


def agreement(prepared: nn.Module, int8: nn.Module | None, x: Tensor) -> float:
    assert int8 is not None
    prepared.eval()
    set_enabled(prepared, observer=False, fake_quant=True)
    with torch.no_grad():
        return sqnr(prepared(x), int8(x))


def test_the_module_stays_the_same_object_of_the_users_class(tmp_path: Path) -> None:
    module = Loose()
    conv, weight = module.conv, module.conv.weight
    qat = fit(tmp_path, module)
    for each in (module, qat.int8_module):
        assert isinstance(each, Loose)
        assert type(each).__name__ == type(each).__qualname__ == "Loose"
        assert type(each).__module__ == Loose.__module__
        assert dict(each.hparams) == {"width": 8, "lr": 0.05}
        assert "forward" not in vars(each)
    assert module.conv is not conv
    assert module.conv.weight is weight
    assert type(Loose(4)) is Loose
    recipe = recipe_of(module)
    assert recipe is not None
    assert (recipe.mode, recipe.layers) == ("fx", ("conv", "body.0", "fc"))
    names = dict(module.named_parameters())
    assert {"conv.weight", "conv.bn.weight", "body.0.bn.weight", "fc.weight", "scale"} < names.keys()
    assert agreement(module, qat.int8_module, dataset(32, seed=2).tensors[0]) > 25


def test_int8_runs_in_a_trainer(tmp_path: Path) -> None:
    module = Loose()
    qat = fit(tmp_path, module, epochs=8)
    (fake,) = trainer(tmp_path).test(module, verbose=False)
    (int8,) = trainer(tmp_path).test(qat.int8_module, verbose=False)
    assert int8["test_accuracy"] == pytest.approx(fake["test_accuracy"], abs=0.04)
    (metrics,) = trainer(tmp_path).validate(qat.int8_module, verbose=False)
    assert 0 <= metrics["accuracy"] <= 1
    kinds = {type(m).__name__ for m in qat.int8_module.modules()}  # type: ignore[union-attr]
    assert "Int8Layer" in kinds
    assert "FakeQuantize" not in kinds


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # Lightning's, of the resumed run
def test_best_checkpoint_second_fit_and_resume(tmp_path: Path) -> None:
    def run(name: str, epochs: int) -> pl.Trainer:
        best = ModelCheckpoint(tmp_path / name, monitor="val_loss", save_last=True)
        return trainer(tmp_path, QuantizationAwareTraining(freeze_observers_at=2), best, max_epochs=epochs)

    module = Loose()
    first = run("first", 3)
    first.fit(module)
    (best,) = first.test(module, ckpt_path="best", verbose=False)
    assert best["test_accuracy"] > 0
    resumed = Loose()
    run("first", 4).fit(resumed, ckpt_path=str(tmp_path / "first" / "last.ckpt"))
    run("second", 3).fit(module)
    assert isinstance(resumed, Loose)
    assert agreement(resumed, convert(resumed), images()) > 25


def test_files(tmp_path: Path) -> None:
    module = Loose()
    best = ModelCheckpoint(tmp_path, save_last=True)
    qat = QuantizationAwareTraining(output_dir=tmp_path)
    trainer(tmp_path, qat, best, max_epochs=2).fit(module)
    x = images()
    loaded = load_int8(tmp_path / "int8.pt", Loose())
    assert isinstance(loaded, Loose)
    assert torch.equal(loaded(x), qat.int8_module(x))  # type: ignore[misc]
    prepared = load_qat_checkpoint(tmp_path / "last.ckpt", Loose())
    assert isinstance(prepared, Loose)
    assert same_state(prepared, module) == []
    assert torch.equal(prepared(x), module.eval()(x))
    again = load_int8(save_int8(convert(prepared), tmp_path / "again.pt"), Loose())
    assert torch.equal(again(x), convert(prepared)(x))


def test_onnx(tmp_path: Path) -> None:
    module = prepare(Loose(), backend="onednn")
    train_steps(module, ((images(),), {}))
    set_enabled(module, observer=False, fake_quant=True)
    x = images()
    assert sqnr(module(x), reference(module)(x)) > 60
    assert export_onnx(module, tmp_path / "loose.onnx").is_file()


def test_deep_copies_share_nothing_with_the_original() -> None:
    module = prepare(Loose())
    train_steps(module, ((images(),), {}))
    copied = copy.deepcopy(module)
    x = images()
    assert torch.equal(copied(x), module(x))
    with torch.no_grad():
        copied.get_parameter("fc.weight").zero_()
        copied.get_parameter("fc.bias").zero_()
        assert not copied(x).any()
        assert module(x).any()
        assert not convert(copied)(x).any()
        assert convert(module)(x).any()


def test_what_was_fused_away_says_what_to_do() -> None:
    module: Any = prepare(Loose())
    for part in (module.bn, module.body):
        with pytest.raises(AttributeError, match=r"Loose was traced.*'(bn|body)'.*Call the whole module"):
            part(images())


class Listed(TinyModule):
    """A ModuleList, a ModuleDict partly called, a layer registered twice and one outside forward."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        del self.model
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(ConvBnRelu() for _ in range(2))
        self.blocks[1].conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        del self.blocks[0]
        self.heads = nn.ModuleDict({"main": nn.Linear(8, CLASSES), "other": nn.Linear(8, CLASSES)})
        self.alias = self.stem
        self.outside = nn.Linear(8, 2)
        self.flag = "plain"

    def forward(self, x: Tensor, verbose: bool = False) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.heads["main"](x.mean((2, 3)))


def test_lists_dicts_and_layers_outside_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("qat_lightning.run.messages.rank_zero_info", said.append)
    module = Listed()
    outside, other = module.outside, module.heads["other"]
    qat = fit(tmp_path, module)
    assert type(module.heads) is nn.ModuleDict
    assert type(module.blocks) is nn.ModuleList
    assert (module.outside, module.heads["other"], module.flag) == (outside, other, "plain")
    assert module.alias is module.stem
    int8: Any = qat.int8_module
    assert type(int8.outside) is type(int8.heads["other"]) is nn.Linear
    assert is_int8(int8.heads["main"])
    assert "(it holds no QuantStubs; heads.other, outside stay float" in said[0]
    assert agreement(module, int8, images()) > 25
    assert module(images(), verbose=False).shape == (16, CLASSES)


class WithDiscriminator(Loose):
    """A network that forward does not call, and a teacher in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = Residual()
        self.teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8)).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + self.discriminator(batch[0]).square().mean()


@pytest.mark.filterwarnings("ignore:Found . module")  # Lightning's, of the teacher
def test_networks_that_forward_does_not_call_are_prepared_by_themselves(tmp_path: Path) -> None:
    module = WithDiscriminator()
    qat = QuantizationAwareTraining(output_dir=tmp_path, freeze_bn_at=1)
    trainer(tmp_path, qat, max_epochs=2).fit(module)
    fit(tmp_path, module, epochs=1, backend="x86", convert=None)
    assert [name for name, _, _ in quantized_networks(module)] == ["", "discriminator", "teacher"]
    loaded = load_int8(tmp_path / "int8.pt", WithDiscriminator())
    x = images()
    assert torch.equal(loaded(x), qat.int8_module(x))  # type: ignore[misc]
    assert torch.equal(loaded.discriminator(x), qat.int8_module.discriminator(x))  # type: ignore[operator, union-attr]


def test_a_batch_norm_in_eval_mode_is_not_woken_by_the_schedule() -> None:
    module = prepare(Loose()).train()
    module.teacher = nn.Sequential(nn.BatchNorm2d(3)).eval()
    freeze_bn_statistics(module, frozen=False)
    assert not module.teacher[0].training


class NoForward(TinyModule):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.fc = nn.Linear(4, 4)

    forward = pl.LightningModule.forward


class ByValue(Loose):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Constants(Loose):
    """Constant tensors, made in forward or kept as an attribute, and an output that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(CLASSES)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = torch.matmul(super().forward(x), torch.eye(CLASSES)) + self.shift
        return {"logits": y, "mean": y.mean()} if self.training else y


def test_constants_and_outputs_by_mode(tmp_path: Path) -> None:
    module = prepare(Constants())
    x = images()
    train_steps(module, ((x,), {}))
    assert set(module.train()(x)) == {"logits", "mean"}
    int8 = convert(module)
    assert agreement(module, int8, x) > 25
    assert torch.equal(load_int8(save_int8(int8, tmp_path / "int8.pt"), Constants())(x), int8(x))
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))


class OwnWeight(Loose):
    """Calls F.linear with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.body, self.fc
        self.weight = nn.Parameter(torch.randn(CLASSES, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.bn(self.conv(x))).mean((2, 3)), self.weight)


def test_a_functional_layer_of_the_module_stays_float(tmp_path: Path) -> None:
    module = OwnWeight()
    qat = fit(tmp_path, module, output_dir=tmp_path)
    x = images()
    assert agreement(module, qat.int8_module, x) > 25
    assert torch.equal(load_int8(tmp_path / "int8.pt", OwnWeight())(x), qat.int8_module(x))  # type: ignore[misc]


def test_a_module_without_a_forward_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NoForward has layers of its own and no `forward`"):
        fit(tmp_path, NoForward())


def test_an_untraceable_forward_gets_file_and_line(tmp_path: Path) -> None:
    module = ByValue()
    with pytest.raises(UntraceableError, match=rf"cannot trace ByValue(.|\n)*{__file__}:\d+: if x.sum"):
        fit(tmp_path, module)
    assert type(module) is ByValue


class LooseResNet(TinyModule):
    """The layers of torchvision's ResNet-18, on the module itself."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        del self.model
        for name, child in torchvision.models.resnet18(num_classes=CLASSES).named_children():
            self.add_module(name, child)

    _forward_impl = torchvision.models.ResNet._forward_impl
    forward = torchvision.models.ResNet.forward  # type: ignore[assignment]


def test_resnet18_with_its_layers_on_the_module() -> None:
    module = prepare(LooseResNet(), backend="onednn")
    apart = torchvision.models.resnet18(num_classes=CLASSES)
    recipe = recipe_of(module)
    assert recipe is not None
    assert len(recipe.layers) == 21
    prepared = prepare(apart, backend="onednn")
    prepared.load_state_dict(module.state_dict())
    x = torch.randn(8, 3, 64, 64)
    torch.manual_seed(1)
    train_steps(module, ((x,), {}))
    torch.manual_seed(1)
    train_steps(prepared, ((x,), {}))
    assert same_state(prepared, module) == []
    assert torch.equal(convert(module)(x), convert(prepared)(x))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.loose_ddp_script", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, timeout=300)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["int8"], ranks[1]["int8"])
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])
    assert ranks[0]["sqnr"] > 25
