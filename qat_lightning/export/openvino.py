"""Exports a prepared network as OpenVINO IR, from its QDQ graph by OpenVINO's own converter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qat_lightning.base import manifest
from qat_lightning.base.atomic import replacing
from qat_lightning.export.example import example_of
from qat_lightning.export.extras import require
from qat_lightning.export.onnx import write_graph
from qat_lightning.export.runtime import OpenVino


def export_openvino(
    prepared: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    min_sqnr: float = 20.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a prepared network as OpenVINO IR: `path`, which ends in `.xml`, and a `.bin` beside it.

    The files are run at once in OpenVINO, and the outputs compared with the fake-quant outputs; only files
    that agree are written, with their checksums in `manifest.json` beside them.

    Args:
        prepared: As in :func:`qat_lightning.export_onnx`, likewise the other arguments.
        path: Where to write; the folder is made.
        example_inputs: Likewise.
        min_sqnr: Likewise; OpenVINO runs its int8 kernels here, which round at other places.
        metadata: Likewise.

    Returns:
        The path of the `.xml` file.

    Raises:
        MissingExtraError: The extra `openvino` or `onnx` is not installed.
        ValueError: `path` has another suffix, there are no example inputs, or nothing prepared.
        ConversionError: No data passed through the network, or the files do not give its outputs.
    """
    require("openvino", "onnx", "onnxscript", purpose="Exporting to OpenVINO")
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"An OpenVINO IR ends in .xml, and its weights go beside it, but received {path}.")
    example = example_of(prepared, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        write_graph(example, graph, {})
        xml, weights = convert_graph(graph, {**example.metadata, **(metadata or {})})
    example.check(OpenVino(xml, weights), path, min_sqnr)
    with replacing(path.with_suffix(".bin")) as partial:
        partial.write_bytes(weights)
    with replacing(path) as partial:
        partial.write_bytes(xml)
    manifest.add(path, path.with_suffix(".bin"))
    return path


def convert_graph(graph: Path, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Converts an ONNX file to the two files of an IR."""
    import openvino

    model = openvino.convert_model(graph)
    for key, value in metadata.items():
        model.set_rt_info(value, key.split(".", 1))
    openvino.save_model(model, graph.with_suffix(".xml"), compress_to_fp16=False)
    return graph.with_suffix(".xml").read_bytes(), graph.with_suffix(".bin").read_bytes()
