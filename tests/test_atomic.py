"""Files are whole or absent, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from qat_lightning import convert, export_onnx, prepare, save_int8
from qat_lightning.base.atomic import remove_partial, replacing
from tests.interruption import finish
from tests.networks import Residual, train_steps
from tests.runs import dataset


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
        if error is not None:
            raise error


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write(path, "one")
    with replacing(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "file", "one")
    with pytest.raises(type(error)):
        write(tmp_path / "file", "tw", error)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "file", "one")
    process = os.fork()
    if not process:
        with replacing(tmp_path / "file") as partial:
            partial.write_text("tw")
            os.kill(os.getpid(), signal.SIGKILL)
    assert finish([process]) == [-9]
    assert (tmp_path / "file").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["int8", "onnx"])
def test_a_full_disk_leaves_no_half_of_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    prepared = prepare(Residual())
    x = dataset(8).tensors[0]
    train_steps(prepared, ((x,), {}))

    def write_int8() -> None:
        save_int8(convert(prepared), tmp_path / "network")

    def write_onnx() -> None:
        export_onnx(prepared, tmp_path / "network", (x,))

    def full(*arguments: Any, **_: Any) -> None:
        if what == "int8":
            arguments[1].write(b"half")
        else:
            Path(arguments[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if what == "int8" else (onnx_ir, "save")), full)
    with pytest.raises(OSError, match="No space left"):
        (write_int8 if what == "int8" else write_onnx)()
    assert list(tmp_path.iterdir()) == []
