"""Finds the line of the user's code behind an error, a graph's node or a forward, as `file:line: code`."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
import typing_extensions
from torch import fx, nn

from qat_lightning.base.subclass import forward_of

_PACKAGE = str(Path(__file__).parents[2])
# The package's own models and data modules count as the user's code: the user can replace them.
_TASKS = str(Path(_PACKAGE) / "tasks")
# typing_extensions wraps the deprecated functions of PyTorch.
_NOT_USER = (
    *(str(Path(torch.__file__).parent), contextlib.__file__, typing_extensions.__file__),
    *("<", _PACKAGE),
)


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Returns the last frame of the traceback in the user's code, outside PyTorch and this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    return frames[-1] if frames else None


def user_line(error: BaseException, network: nn.Module) -> str:
    """Returns the line of :func:`user_frame`, or the file of `network`'s class."""
    frame = user_frame(error)
    if frame is None:
        return f"{inspect.getsourcefile(type(network))}"
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def forward_line(network: nn.Module) -> str:
    """Returns the line where the forward of `network`'s class begins."""
    code = getattr(forward_of(network), "__code__", None)
    if code is None:
        return "an unknown line"
    line = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    return f"{code.co_filename}:{code.co_firstlineno}: {line}"


def stack_line(node: fx.Node) -> str:
    """Returns the line that created a node of a graph."""
    lines = (node.stack_trace or "").splitlines()
    frames = [(line.split('"', 2), code.strip()) for line, code in pairwise([*lines, ""]) if "File " in line]
    user_frames = [(place, code) for place, code in frames if is_user_file(place[1])]
    if not user_frames:
        return "an unknown line"
    (_, file, rest), code = user_frames[-1]
    return f"{file}:{rest.split('line ')[1].split(',')[0]}: {code}"


def current_user_line() -> str:
    """Returns the innermost line of the user's code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"


def is_user_file(filename: str) -> bool:
    """Whether a file is the user's: not PyTorch's, not this package's own, and not generated code."""
    return filename.startswith(_TASKS) or not filename.startswith(_NOT_USER)
