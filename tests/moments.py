"""Moments at which a run may be interrupted: a call of a function, or half a checkpoint in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener  # type: ignore[import-untyped]

import qat_lightning.cli.train
import qat_lightning.run.conversion
import qat_lightning.run.parts.exports
from qat_lightning.tasks.classifier import ImageClassifier


@dataclass(frozen=True)
class Call:
    """The moment of a call, counted from 1, of a function of a module or class.

    Attributes:
        owner: The module or class.
        name: The function in it.
        count: Which call.
        after: Whether the moment is after the call has done its work, or before.
    """

    owner: Any
    name: str
    count: int = 1
    after: bool = False

    def __post_init__(self) -> None:
        """Fails on import where the function was renamed.

        Raises:
            AttributeError: If `owner` has no function of that name.
        """
        getattr(self.owner, self.name)

    def arm(self, act: Callable[[], None]) -> None:
        """Puts a function in place that calls `act` at the moment."""
        original = getattr(self.owner, self.name)
        calls = 0

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.count and not self.after:
                act()
            result = original(*args, **kwargs)
            if calls == self.count and self.after:
                act()
            return result

        setattr(self.owner, self.name, replaced)


@dataclass(frozen=True)
class HalfCheckpoint:
    """The moment when half of a checkpoint lies in its place, as where it is copied from another file system.

    Attributes:
        count: Which checkpoint, counted from 1.
    """

    count: int

    def arm(self, act: Callable[[], None]) -> None:
        """Makes the commit of that file write half of it and call `act`."""
        original, calls = LocalFileOpener.commit, 0

        def half(opener: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == self.count:
                content = Path(opener.temp).read_bytes()
                Path(opener.path).write_bytes(content[: len(content) // 2])
                act()
            original(opener)

        LocalFileOpener.commit = half  # type: ignore[method-assign]


Moment = Call | HalfCheckpoint

MOMENTS: dict[str, Moment] = {
    "the first step": Call(ImageClassifier, "training_step", 1),
    "a step in mid-epoch": Call(ImageClassifier, "training_step", 9),
    "the first step with frozen observers": Call(ImageClassifier, "training_step", 6),
    "after the first step with frozen batch-norm": Call(ImageClassifier, "training_step", 11, after=True),
    "an optimizer step": Call(torch.optim.SGD, "step", 8),
    "the last step": Call(ImageClassifier, "training_step", 15),
    "a validation": Call(ImageClassifier, "validation_step", 6),
    "the last validation": Call(ImageClassifier, "validation_step", 8),
    "torch.save of a checkpoint": Call(torch, "save", 6),
    "before the last checkpoint is in place": Call(LocalFileOpener, "commit", 5),
    "after a checkpoint is in place": Call(LocalFileOpener, "commit", 3, after=True),
    "half a checkpoint": HalfCheckpoint(2),
    "half a later checkpoint": HalfCheckpoint(4),
    "half the last checkpoint": HalfCheckpoint(5),
    "the conversion": Call(qat_lightning.run.conversion, "convert"),
    "after the conversion": Call(qat_lightning.run.conversion, "convert", after=True),
    "writing the int8 file": Call(qat_lightning.run.parts.exports, "save_int8"),
    "before the int8 file is in place": Call(Path, "replace", 2),
    "after the int8 file is in place": Call(Path, "replace", 2, after=True),
    "scoring the int8 network": Call(qat_lightning.cli.train, "score_on_test", 2),
    "writing metrics.json": Call(Path, "replace", 3),
    "after metrics.json is in place": Call(Path, "replace", 3, after=True),
}
