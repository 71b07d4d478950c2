"""The quantization modes by name; to add a mode, add an entry to `_MODES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import nn

from qat_lightning.base.errors import nearest
from qat_lightning.base.subclass import derives_from
from qat_lightning.modes.base import Mode, ModeResult, Options
from qat_lightning.modes.fx.mode import FxMode

__all__ = ["Mode", "ModeResult", "Options", "check_mode", "check_untraceable", "choose_mode", "get_mode"]


def _eager() -> Mode:
    from qat_lightning.modes.eager.mode import EagerMode  # it imports torch.ao

    return EagerMode()


_STUBS = ("QuantStub", "DeQuantStub", "QuantWrapper")
_MODES: dict[str, Callable[[], Mode]] = {"eager": _eager, "fx": FxMode}


@cache
def get_mode(name: str) -> Mode:
    """Returns the mode with this name."""
    return _MODES[name]()


def check_mode(mode: str) -> str:
    """Returns `mode` if it is `"auto"` or the name of a mode.

    Raises:
        ValueError: It is neither.
    """
    known = ("auto", *_MODES)
    if mode not in known:
        raise ValueError(f"mode must be one of {known}, but received {mode!r}. {nearest(str(mode), known)}")
    return mode


def check_untraceable(untraceable: str) -> str:
    """Returns `untraceable` if it is `"error"` or `"float"`.

    Raises:
        ValueError: It is neither.
    """
    if untraceable not in ("error", "float"):
        raise ValueError(
            "untraceable must be 'error', or 'float' to keep float what torch.fx cannot trace, but received "
            f"{untraceable!r}."
        )
    return untraceable


def choose_mode(network: nn.Module, mode: str) -> tuple[str, str]:
    """Returns the name of the mode to prepare `network` in, and the reason in a few words."""
    if mode != "auto":
        return mode, "as asked"
    if any(derives_from(m, "torch.ao.", *_STUBS) for m in network.modules()):
        return "eager", "it holds QuantStubs"
    return "fx", "it holds no QuantStubs"
