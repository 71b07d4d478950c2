"""Reads the digits in an image of a line: convolutions, a recurrent layer, and CTC."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate

from examples.ocr.layers import conv, falling_rate

BLANK = 0  # of CTC; a digit is one more than it says
CLASSES = 11


class Head(nn.Module):
    """Reads the columns of a feature map from left to right and from right to left."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        columns = features.flatten(1, 2).transpose(1, 2)
        return self.linear(self.lstm(self.dropout(columns))[0])


class Reader(nn.Module):
    """Maps Nx1x32x128 to the logits of the blank and of ten digits, for each of 32 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv(1, 16, stride=2), conv(16, 24), conv(24, 32, stride=2), conv(32, 32),
            conv(32, 48, stride=(2, 1)), conv(48, 48),
        )  # fmt: skip
        self.head = Head(4 * 48, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


class Recognition(LightningModule):
    """Trains a reader with CTC, and tests how many strings and characters it reads correctly.

    Args:
        lr: Learning rate that the training begins with.
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.model = Reader()
        self.strings, self.errors = MeanMetric(), CharErrorRate()

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        images, texts = batch
        scores = self.model(images).log_softmax(2).transpose(0, 1)
        steps = torch.full((len(texts),), len(scores))
        lengths = torch.tensor([len(text) for text in texts])
        return F.ctc_loss(scores, encode(texts), steps, lengths, BLANK)

    def validation_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))

    def test_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> None:
        images, texts = batch
        read = decode(self.model(images))
        self.strings.update(torch.tensor([float(a == b) for a, b in zip(read, texts, strict=True)]))
        self.errors.update(read, texts)

    def on_test_epoch_end(self) -> None:
        self.log("string accuracy", self.strings.compute())
        self.log("character accuracy", 1 - self.errors.compute())
        self.strings.reset()
        self.errors.reset()

    def configure_optimizers(self) -> Any:
        return falling_rate(self)


def encode(texts: list[str]) -> Tensor:
    """Returns the classes of all characters, one string after the other."""
    return torch.tensor([int(character) + 1 for text in texts for character in text])


def decode(logits: Tensor) -> list[str]:
    """Returns the likeliest class of each column, without repetitions and then without blanks."""
    paths = logits.argmax(2).tolist()
    return ["".join(str(each - 1) for each, _ in groupby(path) if each != BLANK) for path in paths]
