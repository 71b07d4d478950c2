"""Writes the int8 files at the end of a run, in each requested format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import nn

from qat_lightning.base.errors import ConversionError, nearest
from qat_lightning.base.inputs import Inputs, arguments_of
from qat_lightning.base.subclass import with_forward
from qat_lightning.export import export_onnx, export_openvino, load_runtime
from qat_lightning.export.extras import require
from qat_lightning.quantize.copies import replace_submodule
from qat_lightning.quantize.example_inputs import Examples
from qat_lightning.quantize.int8_file import save_int8
from qat_lightning.run.part import Part

ModuleT = TypeVar("ModuleT", bound=nn.Module)

FORMATS = ("torch", "onnx", "openvino")
METRICS_KEY = "qat_lightning.metrics"


class Exports(Part):
    """Writes the int8 networks in the requested formats.

    Args:
        formats: Some of :data:`FORMATS`.

    Raises:
        TypeError: `formats` is not a sequence.
        ValueError: A format is unknown.
    """

    def __init__(self, formats: Sequence[str]) -> None:
        if isinstance(formats, str) or not isinstance(formats, Sequence):
            raise TypeError(
                f"export must be a list of formats, as in export=['onnx'], but received {formats!r}."
            )
        for each in formats:
            if each not in FORMATS:
                raise ValueError(
                    f"export takes {', '.join(FORMATS)}, but received {each!r}. {nearest(each, FORMATS)}"
                )
        self.formats = tuple(formats)

    @property
    def need_inputs(self) -> bool:
        """Returns whether a format needs example inputs, to trace a graph."""
        return any(each != "torch" for each in self.formats)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises a `MissingExtraError` if a format needs a package that is not installed."""
        if self.need_inputs:
            require("onnx", "onnxscript", "onnxruntime", purpose="Exporting to ONNX")
        if "openvino" in self.formats:
            require("openvino", purpose="Exporting to OpenVINO")

    def write(
        self,
        module: nn.Module,
        int8: nn.Module,
        names: Sequence[str],
        folder: Path,
        metrics: Mapping[str, float],
        inputs: Mapping[str, Inputs],
    ) -> list[Path]:
        """Writes all files.

        Args:
            module: The module with the trained networks.
            int8: Its int8 copy.
            names: Names of the networks in it. If there are several, each ONNX or OpenVINO file is named
                after its network.
            folder: Where to write.
            metrics: Metrics that ONNX and OpenVINO files hold as metadata, beside the recipe.
            inputs: The inputs of each network in the first batch, to trace and check the graphs with.

        Returns:
            The files, `int8.pt` first.

        Raises:
            ConversionError: A graph does not compute what was trained, or there are no inputs to trace it
                with.
        """
        metadata = {METRICS_KEY: json.dumps(dict(metrics))}
        written = [save_int8(int8, folder / "int8.pt")] if "torch" in self.formats else []
        for each, export, suffix in (("onnx", export_onnx, "onnx"), ("openvino", export_openvino, "xml")):
            for name in names if each in self.formats else ():
                part = f".{name}" if len(names) > 1 else ""
                arguments = _arguments(module, name, inputs)
                path = folder / f"int8{part}.{suffix}"
                written.append(export(module.get_submodule(name), path, arguments, metadata=metadata))
        return written

    def shipped(self, module: ModuleT, path: Path, names: Sequence[str]) -> ModuleT:
        """Replaces a network by the ONNX or OpenVINO file that was exported from it, in place."""
        parts = path.stem.split(".", 1)
        name = parts[1] if len(parts) > 1 else names[0]
        runtime = load_runtime(path)
        return replace_submodule(module, name, runtime) if name else _redirect_forward(module, runtime)


def _arguments(module: nn.Module, name: str, inputs: Mapping[str, Inputs]) -> Any:
    """Returns the arguments of a network, by name if its `forward` names them all."""
    if name in inputs:
        return arguments_of(module.get_submodule(name), inputs[name])
    found = Examples(module, None, [name]).of(name)
    if found is None:
        raise ConversionError(
            f"No batch has reached the network {name or type(module).__name__!r}, so there is nothing to "
            "trace its graph with. Give the LightningModule an example_input_array."
        )
    return arguments_of(module.get_submodule(name), found)


def _redirect_forward(module: ModuleT, runtime: nn.Module) -> ModuleT:
    """Replaces the `forward` of a `module` that is a network itself by the runtime's, in place."""
    module.__class__ = with_forward(type(module), staticmethod(runtime.forward))  # type: ignore[assignment]
    return module
