"""Loads the float weights that a run starts from, from a Lightning checkpoint or a plain state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

_PREFIXES = ("network.", "module.")
_QAT_MARKS = ("fake_quant", "activation_post_process")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Loads float weights into a network, all of them or none.

    Args:
        network: The network. Its state dict must have exactly the keys and shapes of the file.
        path: A Lightning checkpoint of an `ImageClassifier` (with keys that begin with `network.`), a plain
            state dict, or a state dict under the key `state_dict` or `model`. Reading it runs no code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, holds a network prepared for QAT, or has other keys or
            shapes. The message lists a few of them.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    expected = network.state_dict()
    _check_keys(expected, state, path)
    _check_shapes(expected, state, path)
    network.load_state_dict(state)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} to load weights from.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a file of weights that torch.load(weights_only=True) can read: {error}"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    _check_float(content, path)
    for prefix in _PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
        content = inside or content
    return dict(content)


def _check_float(content: Any, path: Path) -> None:
    named = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    if named and any(mark in key for key in content for mark in _QAT_MARKS):
        raise ValueError(
            f"{path} holds a network prepared for quantization-aware training, not float weights. "
            "Read it with qat_lightning.load_qat_checkpoint, or continue its training with "
            "trainer.fit(ckpt_path=…), on the command line ckpt_path=…"
        )
    if not named or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors).")


def _check_keys(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{path} holds the weights of another network. Missing: {_some(missing)}."
            f" Unexpected: {_some(unexpected)}."
        )


def _check_shapes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"{path} holds weights of other shapes, for example for another number of classes or another "
            f"width: {_some(wrong)}."
        )


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more
