from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from qat_lightning.tasks.classifier import ImageClassifier, classification_loss
from qat_lightning.tasks.data import DigitsData
from qat_lightning.tasks.models import DigitsCNN, torchvision_model

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def fit(classifier: ImageClassifier, data: Any, **options: Any) -> Trainer:
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options |= dict.fromkeys(names, False)
    trainer = Trainer(accelerator="cpu", **options)
    trainer.fit(classifier, datamodule=data)
    return trainer


def test_learns_digits() -> None:
    data = DigitsData()
    scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=8)
    classifier = ImageClassifier(DigitsCNN(), 10, optimizer=SGD, scheduler=scheduler)
    trainer = fit(classifier, data, max_epochs=8)
    assert trainer.callback_metrics["train/loss"] < 0.1
    assert trainer.callback_metrics["val/loss"] < 0.15
    assert trainer.callback_metrics["val/accuracy"] >= 0.97
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)  # stepped once an epoch
    (results,) = trainer.test(classifier, data, verbose=False)
    correct = sum(
        int((classifier.eval()(images).argmax(1) == labels).sum())
        for images, labels in data.test_dataloader()
    )
    assert results["test/accuracy"] == pytest.approx(correct / 359)
    assert correct >= 0.97 * 359


def test_auxiliary_classifiers_count_a_third() -> None:
    main, auxiliary, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    expected = cross_entropy(main, labels) + 0.3 * cross_entropy(auxiliary, labels)
    assert classification_loss((main, auxiliary, None), labels) == pytest.approx(float(expected))
    assert classification_loss(main, labels) == cross_entropy(main, labels)
    smooth = cross_entropy(main, labels, label_smoothing=0.1)
    assert classification_loss(main, labels, 0.1) == smooth


def test_trains_googlenet_with_its_tuple_of_outputs() -> None:
    network = torchvision_model("googlenet", num_classes=10, init_weights=False)
    data = DigitsData(batch_size=2, image_size=32, channels=3)
    classifier = ImageClassifier(network, 10, optimizer=SGD)
    trainer = fit(classifier, data, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    assert trainer.callback_metrics["train/loss"] > 2  # about 1.6 times log 10
    assert trainer.global_step == 1


def test_bad_arguments_fail_at_once() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, but received 1"):
        ImageClassifier(nn.Identity(), 1, optimizer=SGD)
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, but received 2"):
        ImageClassifier(nn.Identity(), 2, optimizer=SGD, label_smoothing=2)
