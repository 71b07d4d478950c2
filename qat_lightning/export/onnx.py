"""Exports a prepared network as a QDQ graph in an ONNX file, and checks its outputs at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_lightning.base import manifest
from qat_lightning.base.atomic import replacing
from qat_lightning.base.quiet import quiet_exporters, quiet_torch_ao
from qat_lightning.base.torch_internals import MappingKey, tree_flatten_with_path, tree_map
from qat_lightning.export.example import Example, example_of
from qat_lightning.export.extras import require
from qat_lightning.export.runtime import OnnxRuntime
from qat_lightning.modes.layers.reference import reference


def export_onnx(
    prepared: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    min_sqnr: float = 20.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a prepared network as an ONNX file of quantize/dequantize nodes with int8 weights.

    The graph is run at once in ONNX Runtime, and its outputs compared with the fake-quant outputs; only a
    file that agrees is written, with its checksum in `manifest.json` beside it.

    Args:
        prepared: A trained network that :func:`qat_lightning.prepare` made, of either mode, or the
            LightningModule that holds it. It is not changed.
        path: Where to write; the folder is made.
        example_inputs: A tuple of arguments for `forward`, or a dict of them by name; they may be nested. The
            first dimension of each tensor is the batch; the file takes any batch size. By default the
            module's `example_input_array`.
        min_sqnr: Least agreement with the fake-quant outputs, in dB. Both round to one grid, so that they
            differ only where the order of additions tips a rounding over: trained networks reach 40 and
            more, a graph that computes something else stays near 0. An untrained one amplifies each
            difference and lies between; it may also be within a step of the outputs' grid in the mean.
        metadata: What else the file shall say of itself, such as metrics. The recipe is in it anyway.

    Returns:
        The path.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        ValueError: There are no example inputs, or nothing prepared in the module.
        ConversionError: No data passed through the network, or the graph does not give its outputs.
    """
    require("onnx", "onnxscript", "onnxruntime", purpose="Exporting to ONNX")
    example = example_of(prepared, example_inputs)
    path = Path(path)
    with replacing(path) as partial:
        write_graph(example, partial, metadata or {}, for_onnx_runtime=True)
        content = partial.read_bytes()
        for optimize in (False, True):  # as it is written, node by node, and as it will be run
            example.check(OnnxRuntime(content, optimize=optimize), path, min_sqnr)
    manifest.add(path)
    return path


def write_graph(
    example: Example,
    path: Path,
    metadata: Mapping[str, str],
    form: Callable[[nn.Module], nn.Module] | None = None,
    *,
    for_onnx_runtime: bool = False,
) -> None:
    """Writes the graph of an example's network, without a check.

    Args:
        example: The network, and what to trace it with.
        path: Where to write.
        metadata: What else the file shall say of itself.
        form: Makes of a prepared network what is traced; the reference graph by default.
        for_onnx_runtime: Whether hard-swishes become products of integers: ONNX Runtime has no int8 kernel
            for one, OpenVINO has.
    """
    import onnx_ir

    from qat_lightning.export.graph import simplify
    from qat_lightning.export.hard_swish import as_products

    with quiet_torch_ao(), quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            (form or reference)(example.module),
            (*example.args, example.kwargs),  # a dict at the end is taken for the keyword arguments, even {}
            dynamo=True,
            verbose=False,
            output_names=_output_names(example.outputs),
            dynamic_shapes=tree_map(_dynamic_batch, example.kwargs or example.args),
        )
        assert program is not None
        model = as_products(program.model) if for_onnx_runtime else program.model
        model = simplify(model)
    model.metadata_props.update({**example.metadata, **metadata})
    onnx_ir.save(model, path)


def _dynamic_batch(value: Any) -> Any:
    batched = isinstance(value, torch.Tensor) and value.ndim > 0
    return {0: torch.export.Dim.AUTO} if batched else None


def _output_names(outputs: Any) -> list[str]:
    """Names each output tensor by the keys and positions that lead to it: `logits`, `boxes_0`."""
    names = []
    for way, value in tree_flatten_with_path(outputs)[0]:
        if isinstance(value, torch.Tensor):
            steps = [step.key if isinstance(step, MappingKey) else getattr(step, "idx", "") for step in way]
            named = steps and not isinstance(steps[0], int)
            names.append("_".join(map(str, steps if named else ["output", *steps])))
    return names
