"""What runs on a GPU: `python -m pytest -m gpu`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from qat_lightning import (
    Distillation,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    convert,
    export_onnx,
    load_runtime,
    prepare,
    sensitivity,
)
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.fake_quant.phases import enter
from tests.networks import CLASSES, Residual, Stubbed, images, same_state, sqnr, train_steps
from tests.runs import TinyModule, dataset, loader, trainer
from tests.test_cli import run as run_from_config
from tests.test_resume import EPOCHS, STEPS, Crash, CrashAt, Noisy, seed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # Lightning's: it wraps a network for DDP in a stream of its own.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
    # The compiler's own.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def on_gpu(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return trainer(folder, *callbacks, **{"accelerator": "gpu", **options})


# Numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("observe", [True, False])
def test_a_grid_is_that_of_the_cpu(dtype: torch.dtype, observe: bool) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        grid = FakeQuantize(quant_min=0, quant_max=255)
        grid(torch.randn(64, 64))
        if not observe:
            grid.disable_observer()
        x = (2 * torch.randn(64, 64)).to(dtype).to(device).requires_grad_()
        y = grid.to(device)(x)
        y.sum().backward()
        assert x.grad is not None
        found.append([each.detach().cpu() for each in (y, x.grad, grid.scale, grid.zero_point)])
    assert all(torch.equal(cpu, gpu) for cpu, gpu in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
def test_a_network_evaluates_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared: Any = prepare(getattr(models, name)(num_classes=CLASSES), backend="onednn").cuda()
    train_steps(prepared, ((images(8, 64).cuda(),), {}))
    enter(prepared, Phase(fake_quant=True, observe=False, freeze_bn=False))
    x = images(8, 64)
    with torch.no_grad():
        gpu, cpu = prepared(x.cuda()).cpu(), copy.deepcopy(prepared).cpu()(x)
        assert sqnr(cpu, gpu) > 30
        int8 = convert(prepared)
        assert sqnr(gpu, int8(x)) > 25
    assert next(prepared.parameters()).is_cuda
    runtime = load_runtime(export_onnx(prepared, tmp_path / "int8.onnx", (x.cuda(),), min_sqnr=25))
    assert sqnr(gpu, runtime(x)) > 25


# Runs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_a_run_converts_to_what_it_trained(tmp_path: Path, precision: Any, network: type[nn.Module]) -> None:
    module = TinyModule(network())
    qat = QuantizationAwareTraining(backend="onednn", freeze_observers_at=0.5, freeze_bn_at=0.8)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    on_gpu(tmp_path, qat, best, max_epochs=3, precision=precision).fit(module)
    for name, grid in fake_quantizes(module):
        assert grid.scale.dtype == torch.float32, name
    assert qat.int8_module is not None
    tensors = [each for each in qat.int8_module.state_dict().values() if isinstance(each, Tensor)]
    assert {each.device.type for each in tensors} == {"cpu"}
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    module.load_state_dict(state)
    x = dataset(32, seed=2).tensors[0]
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 30


class Compiled(TinyModule):
    """Compiles its network once it is prepared."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_fit_start(self) -> None:
        self.model.compile()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_run(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    module = Compiled()
    qat = QuantizationAwareTraining(backend="onednn", convert="last")
    on_gpu(tmp_path, qat, max_epochs=3, precision=precision).fit(module)
    assert qat.int8_module is not None
    x = dataset(32, seed=2).tensors[0]
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 30


def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on the GPU draws from its generator, whose state a checkpoint holds."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def fit(folder: Path, *extra: pl.Callback, ckpt_path: Path | None = None) -> Any:
        module = Noisy()
        qat = QuantizationAwareTraining(convert="last", freeze_observers_at=0.6, freeze_bn_at=3)
        checkpoint = ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss", filename="{epoch}")
        options: dict[str, Any] = {"max_epochs": EPOCHS, "deterministic": True}
        on_gpu(folder, qat, checkpoint, *extra, **options).fit(module, ckpt_path=ckpt_path)
        return module, qat.int8_module

    try:
        seed()
        whole, int8 = fit(tmp_path / "whole")
        seed()
        with pytest.raises(Crash):
            fit(tmp_path / "crashed", CrashAt(2 * STEPS + 2))
        torch.manual_seed(99), np.random.seed(99)
        resumed, again = fit(tmp_path / "crashed", ckpt_path=tmp_path / "crashed" / "epoch=1.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_state(whole, resumed) == []
    x = dataset(32, seed=2).tensors[0]
    assert torch.equal(int8(x), again(x))


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    class Broken(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 3:
                nn.init.constant_(self.model.get_parameter("fc.bias"), float("nan"))
            return super().training_step(batch, batch_idx)

    qat = QuantizationAwareTraining(convert=None)
    with pytest.raises(FloatingPointError, match="fc"):
        on_gpu(tmp_path, qat, max_epochs=2).fit(Broken())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_teacher_is_where_the_network_is(tmp_path: Path, precision: Any) -> None:
    module = TinyModule()
    qat = QuantizationAwareTraining(distillation=Distillation(), convert="last")
    on_gpu(tmp_path, qat, max_epochs=2, precision=precision).fit(module)
    assert not [name for name in module.state_dict() if "teacher" in name]
    assert qat.int8_module is not None


def test_calibration_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TinyModule()
    on_gpu(tmp_path, max_epochs=4, enable_checkpointing=False).fit(module)
    ptq = PostTrainingQuantization(backend="onednn")
    on_gpu(tmp_path, ptq).validate(module, loader(48), verbose=False)
    x = dataset(32, seed=3).tensors[0]
    assert ptq.int8_module is not None
    with torch.no_grad():
        assert sqnr(module.cpu().eval()(x), ptq.int8_module(x)) > 20


def test_sensitivity_of_a_network_on_the_gpu() -> None:
    torch.manual_seed(0)
    network = Residual().cuda().eval()
    found = sensitivity(network, loader(16))
    assert {each.name for each in found.layers} >= {"stem.0", "block.0", "fc"}
    assert next(network.parameters()).is_cuda


# The command


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    "options",
    [
        ["trainer=gpu"],
        ["trainer=gpu", "trainer.precision=bf16-mixed"],
        ["trainer=ddp", "trainer.devices=1"],
        ["trainer=ddp", "trainer.devices=1", "trainer.sync_batchnorm=true"],
    ],
)
def test_the_command(tmp_path: Path, options: list[str]) -> None:
    quiet = ["trainer.enable_progress_bar=false", "trainer.max_epochs=3"]
    metrics = run_from_config(tmp_path, *options, *quiet)
    assert metrics["int8_accuracy"] == pytest.approx(metrics["fake_quant_accuracy"], abs=0.01)
