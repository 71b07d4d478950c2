"""A BERT that classifies reviews: a LightningModule without any code for quantization."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification

from examples.text.data import Batch
from examples.text.reviews import ANSWERS

WIDTH = 64


class Classifier(LightningModule):
    """Trains a small BERT, at first from random weights.

    Args:
        words: Number of words that the tokenizer knows.
        lr: Highest learning rate.
        attention: Which of transformers' implementations of attention to use.
    """

    def __init__(self, words: int, lr: float, attention: str = "sdpa") -> None:
        super().__init__()
        self.lr = lr
        options: dict[str, Any] = {
            "vocab_size": words,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": 64,
            "num_labels": len(ANSWERS),
            "initializer_range": WIDTH**-0.5,  # BERT's 0.02 is for a width of 768
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "attn_implementation": attention,
        }
        self.model = BertForSequenceClassification(BertConfig(**options))
        self.accuracy = MulticlassAccuracy(len(ANSWERS), average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, answers = batch
        return F.cross_entropy(self.model(**inputs).logits, answers)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score("val/accuracy", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score("test/accuracy", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _score(self, name: str, batch: Batch) -> None:
        inputs, answers = batch
        self.accuracy(self.model(**inputs).logits, answers)
        self.log(name, self.accuracy, on_step=False, on_epoch=True, batch_size=len(answers))
