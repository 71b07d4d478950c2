"""A damaged, renamed or replaced file is refused before anything parses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning import (
    Int8FileError,
    convert,
    export_onnx,
    export_openvino,
    load_runtime,
    prepare,
    save_int8,
)
from qat_lightning.base.manifest import MANIFEST
from tests.networks import Residual, images, train_steps
from tests.test_files import Explosive


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same network in every format."""
    torch.manual_seed(0)
    folder, prepared = tmp_path_factory.mktemp("exported"), prepare(Residual())
    train_steps(prepared, ((images(),), {}))
    save_int8(convert(prepared), folder / "int8.pt")
    export_onnx(prepared, folder / "int8.onnx", (images(),))
    export_openvino(prepared, folder / "int8.xml", (images(),))
    return folder


FILES = ["int8.pt", "int8.onnx", "int8.xml", "int8.bin"]


def load(path: Path, **options: Any) -> nn.Module:
    return load_runtime(path.with_suffix(".xml") if path.suffix == ".bin" else path, Residual(), **options)


def copy_of(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_one_manifest_lists_every_file(exported: Path) -> None:
    listed = json.loads((exported / MANIFEST).read_text())["files"]
    assert sorted(listed) == sorted(FILES)
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        name: (exported / name).stat().st_size for name in FILES
    }
    for name in FILES:
        load(exported / name)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte(exported: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(exported, tmp_path)
    content = bytearray((folder / name).read_bytes())
    positions = torch.randint(len(content), (20,), generator=torch.Generator().manual_seed(1)).tolist()
    for position in [0, len(content) - 1, *positions]:
        altered = bytearray(content)
        altered[position] ^= 1 << position % 8
        (folder / name).write_bytes(altered)
        with pytest.raises(Int8FileError, match="is not the file that was exported"):
            load(folder / name)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(Int8FileError, match="truncated"):
        load(folder / name)


@pytest.mark.parametrize("name", FILES)
def test_without_a_manifest_it_is_asked_for(exported: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(exported, tmp_path)
    (folder / MANIFEST).unlink()
    with pytest.raises(Int8FileError, match=rf"no {MANIFEST} beside it.*verify=False"):
        load(folder / name)
    load(folder / name, verify=False)


def test_a_file_of_another_name_and_a_damaged_manifest(exported: Path, tmp_path: Path) -> None:
    folder = copy_of(exported, tmp_path)
    (folder / "int8.onnx").rename(folder / "other.onnx")
    with pytest.raises(Int8FileError, match=r"does not list other.onnx"):
        load(folder / "other.onnx")
    for text in ("", "[]", '{"files": {"int8.pt": 3}}', '{"files": [1]}'):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(Int8FileError, match=rf"{MANIFEST} is damaged"):
            load(folder / "int8.pt")


@pytest.mark.parametrize("name", ["int8.pt", "int8.onnx", "int8.xml"])
def test_a_planted_payload_is_not_run(exported: Path, tmp_path: Path, name: str) -> None:
    folder, trace = copy_of(exported, tmp_path), tmp_path / "trace"
    torch.save({"format": "qat-lightning int8", "state_dict": {}, "more": Explosive(trace)}, folder / name)
    for options in ({}, {"verify": False}):
        with pytest.raises(Int8FileError):
            load(folder / name, **options)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["int8.pt", "int8.onnx", "int8.xml"])
def test_damage_that_nobody_verifies_is_a_clear_error(exported: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(exported, tmp_path)
    content = (folder / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x00" * 500):
        (folder / name).write_bytes(damaged)
        with pytest.raises(Int8FileError, match="cannot"):
            load(folder / name, verify=False)


def test_what_is_no_exported_file(tmp_path: Path) -> None:
    with pytest.raises(Int8FileError, match=r"reads \.onnx, \.xml \(OpenVINO\) and \.pt files"):
        load_runtime(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_runtime(tmp_path / "int8.onnx")


def test_weights_alone_need_a_network(exported: Path) -> None:
    with pytest.raises(ValueError, match="pass a freshly built float network"):
        load_runtime(exported / "int8.pt")
