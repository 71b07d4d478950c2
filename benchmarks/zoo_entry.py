"""One network of the zoo, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat_lightning.base.inputs import Inputs


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        name: Its name, with the mode in brackets where it is listed in both.
        source: The package that it comes from.
        family: The module of that package, or the kind of network.
        size: Height and width of its images, or the length of its texts.
        build: Makes it, untrained.
        call: Makes the arguments of its call, a batch of two.
        mode: The mode to prepare it in.
        part: The submodule to prepare; all of it if empty.
    """

    name: str
    source: str
    family: str
    size: str
    build: Callable[[], nn.Module]
    call: Callable[[], Inputs]
    mode: str = "fx"
    part: str = ""


def images(size: int, name: str = "") -> Callable[[], Inputs]:
    """Returns what makes two random images, as the argument `name` if there is one."""

    def call() -> Inputs:
        batch = torch.randn(2, 3, size, size)
        return Inputs((), {name: batch}) if name else Inputs((batch,), {})

    return call


def images_with_boxes(size: int) -> Callable[[], Inputs]:
    """Returns what makes two random images with one box each, for a detector that computes its losses."""

    def box() -> dict[str, Tensor]:
        return {"boxes": torch.tensor([[8.0, 8.0, size - 8.0, size - 8.0]]), "labels": torch.tensor([1])}

    return lambda: Inputs(([*torch.randn(2, 3, size, size)], [box(), box()]), {})


def texts(length: int) -> Callable[[], Inputs]:
    """Returns what makes two texts of random tokens, of which the second is half as long."""

    def call() -> Inputs:
        ids = torch.randint(1000, 20000, (2, length))
        mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
        return Inputs((), {"input_ids": ids, "attention_mask": mask.long()})

    return call
