"""Exports a prepared network as OpenVINO IR, with OpenVINO's own converter for the QDQ graph."""

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
from qat_lightning.export.maxima import round_before_maxima
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

    The graph runs in OpenVINO right away, and its outputs are compared with the fake-quant outputs. The files
    are written only if they agree. Their checksums go into `manifest.json` beside them.

    Args:
        prepared: As in :func:`qat_lightning.export_onnx`.
        path: Where to write the `.xml` file. The folder is created if needed.
        example_inputs: As in `export_onnx`.
        min_sqnr: As in `export_onnx`. OpenVINO's int8 kernels run here, and they round in other places.
        metadata: As in `export_onnx`.

    Returns:
        The path of the `.xml` file.

    Raises:
        MissingExtraError: The extra `openvino` or `onnx` is not installed.
        ValueError: `path` has another suffix, there are no example inputs, or the module holds no prepared
            network.
        ConversionError: The network has not seen any data, or the outputs of the graph differ from its own.
    """
    require("openvino", "onnx", "onnxscript", purpose="Exporting to OpenVINO")
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(
            "The path of an OpenVINO IR ends in .xml, and its weights go into a .bin file beside it, but "
            f"received {path}."
        )
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
    """Converts an ONNX file to OpenVINO IR, and returns the contents of its `.xml` and `.bin` files."""
    import openvino

    model = openvino.convert_model(graph)
    round_before_maxima(model)
    for key, value in metadata.items():
        model.set_rt_info(value, key.split(".", 1))
    openvino.save_model(model, graph.with_suffix(".xml"), compress_to_fp16=False)
    return graph.with_suffix(".xml").read_bytes(), graph.with_suffix(".bin").read_bytes()
