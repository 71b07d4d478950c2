"""Turns reviews into batches: a word-level tokenizer, padding to the longest of a batch, and masks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from examples.text.reviews import Review, write

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
Batch = tuple[dict[str, Tensor], Tensor]
"""The arguments of a BERT, and the answers."""


class Tokenizer:
    """Gives each word a number, and makes a BERT's arguments of texts.

    Args:
        texts: The texts whose words it knows.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        words = sorted({word for text in texts for word in text.split()})
        self.ids = {word: i for i, word in enumerate([*SPECIAL, *words])}

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns `input_ids` and `attention_mask`, padded to the longest text."""
        rows = [torch.tensor([self._id(word) for word in f"[CLS] {text} [SEP]".split()]) for text in texts]
        masks = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }

    def _id(self, word: str) -> int:
        return self.ids.get(word, self.ids["[UNK]"])


class Reviews(LightningDataModule):
    """Reviews to train on, to validate and to test with; no two are the same.

    Args:
        trained: Number of reviews to train on.
        tested: Number to test with, and to validate with.
        batch: Reviews in a step.
        seed: Seed of the reviews.
    """

    def __init__(self, trained: int, tested: int, batch: int = 64, seed: int = 0) -> None:
        super().__init__()
        dice, unique = random.Random(seed), dict[Review, None]()
        while len(unique) < trained + 2 * tested:
            unique[write(dice)] = None
        reviews = [*unique]
        self.test, self.val, self.train = (
            reviews[:tested],
            reviews[tested : 2 * tested],
            reviews[2 * tested :],
        )
        self.batch, self.tokenizer = batch, Tokenizer(review.text for review in self.train)

    def train_dataloader(self) -> DataLoader[Review]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Review]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Review]:
        return self._loader(self.test)

    def _loader(self, reviews: list[Review], *, shuffle: bool = False) -> DataLoader[Review]:
        data: Any = reviews
        return DataLoader(data, self.batch, shuffle=shuffle, collate_fn=self._collate)

    def _collate(self, reviews: list[Review]) -> Batch:
        inputs = self.tokenizer([review.text for review in reviews])
        return inputs, torch.tensor([review.answer for review in reviews])
