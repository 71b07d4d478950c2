"""A LightningModule that trains an image classifier. The callback works with any other one as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

#: Weight of each auxiliary classifier's loss, from the GoogLeNet paper.
AUXILIARY_WEIGHT = 0.3

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Trains with cross entropy. Logs `train/loss`, `val/loss`, `val/accuracy` and `test/accuracy`.

    Args:
        network: Maps images (batch x channels x height x width) to logits (batch x classes). In training mode
            it may return a tuple of logits (googlenet, inception_v3): the first has weight 1, every further
            one 0.3.
        num_classes: Number of classes.
        optimizer: Makes the optimizer from the parameters: `functools.partial(torch.optim.SGD, lr=0.1)`.
        scheduler: Makes the scheduler from the optimizer. It steps after every epoch. None keeps the rate.
        label_smoothing: Share of the training target that is spread over all classes, 0 to 1.

    Raises:
        ValueError: `num_classes` is below 2 or `label_smoothing` is outside 0 to 1.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, but received {num_classes}.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, but received {label_smoothing}.")
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Returns the network's output: logits, or in training mode also a tuple of logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch of (images, labels)."""
        images, labels = batch
        loss = classification_loss(self(images), labels, self.label_smoothing)
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of a batch of (images, labels)."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        loss = cross_entropy(logits, labels)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(labels))
        self.log(
            "val/accuracy",
            self.val_accuracy,
            metric_attribute="val_accuracy",
            prog_bar=True,
            batch_size=len(labels),
        )

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the accuracy of a batch of (images, labels)."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        name = "test_accuracy"
        self.log("test/accuracy", self.test_accuracy, metric_attribute=name, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, with the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def classification_loss(
    outputs: Tensor | tuple[Tensor | None, ...], labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the cross entropy of logits, or of a tuple of main and auxiliary logits.

    Args:
        outputs: Logits (batch x classes), or a tuple of the main logits and those of auxiliary classifiers.
            The auxiliary ones have weight 0.3. None among them is skipped.
        labels: Classes (batch), int64.
        label_smoothing: Share of the target that is spread over all classes, 0 to 1.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> loss = classification_loss((logits, logits, None), labels)
        >>> round(float(loss), 3)  # 1.3 times log 4
        1.802
    """
    main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    assert main is not None
    loss = cross_entropy(main, labels, label_smoothing=label_smoothing)
    for logits in auxiliary:
        if logits is not None:
            loss = loss + AUXILIARY_WEIGHT * cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss
