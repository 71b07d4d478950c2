"""The end of a run: which weights are converted, where they go, and what still works afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from qat_lightning import ConversionError, QuantizationAwareTraining, convert, load_int8, load_qat_checkpoint
from qat_lightning.quantize.recipe import quantized_networks
from qat_lightning.run.chosen_weights import fake_quant_is_on
from tests.networks import Residual, Stubbed, same_state, sqnr
from tests.runs import TinyModule, dataset, trainer


class Scored(TinyModule):
    """Logs a metric whose course is given, epoch by epoch."""

    def __init__(self, scores: tuple[float, ...] = (0.1, 0.9, 0.5, 0.4), network: nn.Module | None = None):
        super().__init__(network)
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch])


def best_of(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder / "ckpt", **{"monitor": "score", "mode": "max", "filename": "{epoch}", **options}
    )


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(dataset(32, seed=2).tensors[0])


@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_the_best_checkpoint_is_converted(tmp_path: Path, network: type[nn.Module]) -> None:
    qat = QuantizationAwareTraining()
    checkpoint = best_of(tmp_path)
    module = Scored(network=network())
    trainer(tmp_path, qat, checkpoint, max_epochs=4).fit(module)
    assert qat.converted_from == checkpoint.best_model_path == str(tmp_path / "ckpt/epoch=1.ckpt")
    assert qat.int8_path == tmp_path / "ckpt/int8.pt"
    best = load_qat_checkpoint(checkpoint.best_model_path, Scored(network=network()))
    assert torch.equal(outputs(convert(best)), outputs(qat.int8_module))  # type: ignore[arg-type]
    assert not torch.equal(outputs(convert(module)), outputs(qat.int8_module))  # type: ignore[arg-type]
    loaded = load_int8(qat.int8_path, Scored(network=network()))
    assert torch.equal(outputs(loaded), outputs(qat.int8_module))  # type: ignore[arg-type]


def test_the_last_weights_are_converted_when_asked(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(convert="last", output_dir=tmp_path / "out")
    module = Scored()
    trainer(tmp_path, qat, best_of(tmp_path), max_epochs=4).fit(module)
    assert qat.converted_from == "last"
    assert qat.int8_path == tmp_path / "out/int8.pt"
    assert torch.equal(outputs(convert(module)), outputs(qat.int8_module))  # type: ignore[arg-type]


def test_nothing_is_converted_when_asked(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(convert=None)
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(TinyModule())
    assert (qat.int8_module, qat.int8_path, qat.converted_from) == (None, None, None)
    assert list(tmp_path.rglob("*.pt")) == []


@pytest.mark.parametrize(
    ("scores", "mode", "chosen"),
    [((0.9, 0.8, 0.4, 0.5), "max", 3), ((0.1, 0.2, 0.4, 0.5), "min", 2), ((0.9, 0.8, 0.5, 0.4), "max", 2)],
)
def test_a_metric_that_peaks_before_fake_quantization(
    tmp_path: Path, scores: tuple[float, ...], mode: str, chosen: int
) -> None:
    qat = QuantizationAwareTraining(fake_quant_from=2)
    checkpoint = best_of(tmp_path, mode=mode, save_top_k=-1)
    trainer(tmp_path, qat, checkpoint, max_epochs=4).fit(Scored(scores))
    assert Path(str(qat.converted_from)).name == f"epoch={chosen}.ckpt"
    on = [fake_quant_is_on(_state(tmp_path / f"ckpt/epoch={epoch}.ckpt")) for epoch in range(4)]
    assert on == [False, False, True, True]
    assert Path(checkpoint.best_model_path).name == "epoch=0.ckpt"


def test_only_a_float_checkpoint_was_kept(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(fake_quant_from=2)
    module = Scored((0.9, 0.8, 0.4, 0.5))
    trainer(tmp_path, qat, best_of(tmp_path), max_epochs=4).fit(module)
    assert qat.converted_from == "last"
    assert torch.equal(outputs(convert(module)), outputs(qat.int8_module))  # type: ignore[arg-type]


def _state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


def test_the_int8_module_is_scored_by_the_users_own_test_step(tmp_path: Path) -> None:
    torch.manual_seed(1)  # from some initial weights one of the four classes is not learned, in float either
    qat = QuantizationAwareTraining(backend="onednn")
    module = TinyModule()
    runner = trainer(tmp_path, qat, max_epochs=8)
    runner.fit(module)
    assert isinstance(qat.int8_module, TinyModule)
    assert [r.int8 for _, _, r in quantized_networks(qat.int8_module)] == [True]
    (int8,) = trainer(tmp_path).test(qat.int8_module, verbose=False)
    (fake,) = runner.test(module, verbose=False)
    assert fake["test_accuracy"] > 0.9
    assert int8["test_accuracy"] == pytest.approx(fake["test_accuracy"], abs=0.04)
    assert sqnr(outputs(module), outputs(qat.int8_module)) > 35


def test_testing_the_best_checkpoint_after_fit(tmp_path: Path) -> None:
    module = Scored()
    runner = trainer(tmp_path, QuantizationAwareTraining(), best_of(tmp_path), max_epochs=4)
    runner.fit(module)
    (last,) = runner.test(module, verbose=False)
    (best,) = runner.test(ckpt_path="best", verbose=False)
    assert set(last) == set(best) == {"test_accuracy"}
    assert same_state(dict(module.state_dict()), _state(tmp_path / "ckpt/epoch=1.ckpt")) == []


def test_a_second_fit_goes_on_from_the_first(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining()
    module = TinyModule()
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
    network, first = module.model, qat.int8_module
    trainer(tmp_path, qat, max_epochs=2, enable_checkpointing=False).fit(module)
    assert module.model is network
    assert qat.int8_module is not first
    assert torch.equal(outputs(convert(module)), outputs(qat.int8_module))  # type: ignore[arg-type]


def test_the_same_trainer_fits_twice(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(freeze_observers_at=1)
    runner = trainer(tmp_path, qat, max_epochs=2, enable_checkpointing=False)
    module = TinyModule()
    runner.fit(module)
    before = outputs(convert(module))
    runner.fit_loop.max_epochs = 4
    runner.fit(module)
    assert runner.global_step == 24
    assert not torch.equal(before, outputs(convert(module)))


def test_a_second_fit_with_another_backend_is_refused(tmp_path: Path) -> None:
    module = TinyModule()
    trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True).fit(module)
    other = QuantizationAwareTraining(backend="qnnpack")
    with pytest.raises(
        ValueError, match=r"'model' is quantized already, with backend='x86'.*'qnnpack'.*Start"
    ):
        trainer(tmp_path, other, fast_dev_run=True).fit(module)


def test_fitting_the_int8_module_is_refused(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining()
    trainer(tmp_path, qat, fast_dev_run=True).fit(TinyModule())
    assert qat.int8_module is not None
    with pytest.raises(
        ValueError, match=r"TinyModule is quantized already: its 'model\.fc' is the int8 module"
    ):
        trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True).fit(qat.int8_module)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    qat = QuantizationAwareTraining(output_dir=tmp_path / "file" / "folder")
    with pytest.raises(MisconfigurationException, match=r"output_dir must be a folder .* Choose another"):
        trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    qat = QuantizationAwareTraining(output_dir=tmp_path / "new" / "folder", convert=None)
    trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_failed_conversion_says_that_the_weights_are_safe(tmp_path: Path) -> None:
    class Unseen(QuantizationAwareTraining):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            observers: list[Any] = [m for m in pl_module.modules() if hasattr(m, "reset_min_max_vals")]
            for observer in observers:
                observer.reset_min_max_vals()

    with pytest.raises(
        ConversionError, match=r"could not be converted.*weights are safe.*load_qat_checkpoint"
    ):
        trainer(tmp_path, Unseen(), max_epochs=1).fit(TinyModule())


def test_hyperparameters_that_are_objects(tmp_path: Path) -> None:
    class WithObject(Scored):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    qat = QuantizationAwareTraining()
    checkpoint = best_of(tmp_path)
    trainer(tmp_path, qat, checkpoint, max_epochs=4).fit(WithObject(tmp_path))
    assert qat.converted_from == checkpoint.best_model_path
