"""A LightningModule around a network that only an example can follow, and data of different lengths."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from tests.captured import Attention

Sample = tuple[Tensor, int]


class Sentences(Dataset[Sample]):
    """Sentences of 4 to 12 words; the class is that of the first word. Reading one draws a random number.

    Args:
        count: How many.
        seed: Their seed.
    """

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
        self.rows = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index].clone()
        row[-1] = torch.randint(1, 20, ())
        return row, int(row[0]) % 3


def collate(samples: list[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """Pads sentences to the longest, and masks the padding."""
    rows = [row for row, _ in samples]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    inputs = {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask}
    return inputs, torch.tensor([label for _, label in samples])


def sentences(count: int = 48, seed: int = 0, **options: Any) -> DataLoader[Sample]:
    data: Any = Sentences(count, seed)
    return DataLoader(data, collate_fn=collate, **{"batch_size": 8, **options})


class Reading(pl.LightningModule):
    """Has no `example_input_array`; its steps draw random numbers, count their calls, and log a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Attention()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.steps: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        self.steps.append("training")
        kept = torch.rand(inputs["input_ids"].shape) < 0.9
        mask = inputs["attention_mask"] * kept
        return F.cross_entropy(self.model(**{**inputs, "attention_mask": mask}).logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.steps.append("validation")
        torch.rand(1)
        logits = self.model(**inputs).logits
        self.accuracy(logits, labels)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Sample]:
        return sentences(shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        return sentences(24, seed=1)


class ToldHow(Reading):
    """Has an `example_input_array`, so that no step has to show how the network is called."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = collate([(torch.arange(1, 9), 0), (torch.arange(1, 6), 0)])[0]

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def logits(module: pl.LightningModule, seed: int = 2) -> Tensor:
    """What the network of a module says about fixed sentences."""
    rows = [(row, 0) for row in Sentences(32, seed).rows]
    with torch.no_grad():
        found: Tensor = module.get_submodule("model").eval()(**collate(rows)[0]).logits
    return found
