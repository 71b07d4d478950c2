"""The errors that this package raises. Each subclasses the builtin that a caller would already catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UntraceableError(ValueError):
    """`torch.fx` cannot turn the network into a graph that behaves like it.

    Attributes:
        part: Name of the innermost submodule that cannot be traced, `""` for the network itself.
        line: The file and line that cannot be traced.
    """

    def __init__(self, message: str, part: str = "", line: str = "") -> None:
        super().__init__(message)
        self.part, self.line = part, line


class GuardError(ValueError):
    """An input would take another path through a captured network than the one that was captured."""


class RecipeMismatchError(RuntimeError):
    """A state dict comes from a network with another quantization recipe, or from a float network."""


class ConversionError(RuntimeError):
    """A prepared network could not be converted to int8. The trained weights are untouched."""


class PreflightError(RuntimeError):
    """A dry run showed that a network would not train, convert or run as int8.

    Attributes:
        network: Name of the network in the LightningModule, `""` for the LightningModule itself.
        path: Name of the submodule that fails, relative to the network; `""` for the network's own forward.
        line: The line of the user's code that led there, as `file:line: code`, or None.
        op: PyTorch's name of the operation that fails; empty if none does.
    """

    def __init__(
        self, message: str, *, network: str = "", path: str = "", line: str | None = None, op: str = ""
    ) -> None:
        super().__init__(message)
        self.network, self.path, self.line, self.op = network, path, line, op


class RankError(RuntimeError):
    """Another process of the distributed run failed, and this one cannot continue without it."""


class RankMismatchError(RuntimeError):
    """The qparams differ between the ranks of a distributed run."""


class Int8FileError(ValueError):
    """A file is not an int8 file of this package, is damaged, or belongs to another network."""


class TargetError(ValueError):
    """The accuracy target cannot be reached, or the float network to compare with is untrained."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "qat-lightning[{extra}]"'
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the known names nearest to `name`."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
    return f"Nearest: {', '.join(map(repr, matches))}." if matches else "There are none."
