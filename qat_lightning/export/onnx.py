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
from qat_lightning.export.fields import returning_fields
from qat_lightning.export.runtime import OnnxRuntime
from qat_lightning.modes.lowering.reference import reference


def export_onnx(
    prepared: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    min_sqnr: float = 20.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a prepared network as an ONNX file of quantize/dequantize nodes with int8 weights.

    The graph runs in ONNX Runtime right away, and its outputs are compared with the fake-quant outputs. The
    file is written only if they agree. Its checksum goes into `manifest.json` beside it.

    Args:
        prepared: A trained network that :func:`qat_lightning.prepare` made, of either mode, or the
            LightningModule that holds it. It is not changed.
        path: Where to write the file. The folder is created if needed.
        example_inputs: A tuple of arguments for `forward`, or a dict of arguments by name; they may be
            nested. The first dimension of each tensor is the batch; the file takes any batch size. The other
            dimensions of integer and bool tensors, such as the length of a text, may have any size too if
            the network allows it. By default the module's `example_input_array`.
        min_sqnr: Least agreement with the fake-quant outputs, in dB. Both use the same scales and zero
            points, so they differ only where another order of additions changes a rounding. Trained networks
            reach 40 dB and more; a graph that computes something else stays near 0. An untrained network
            amplifies each difference and lies in between. Its outputs also pass if they differ by less than
            one quantization step on average.
        metadata: Further metadata for the file, such as metrics. The recipe is always included.

    Returns:
        The path.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        ValueError: There are no example inputs, or the module holds no prepared network.
        ConversionError: The network has not seen any data, or the outputs of the graph differ from its own.
    """
    require("onnx", "onnxscript", "onnxruntime", purpose="Exporting to ONNX")
    example = example_of(prepared, example_inputs)
    path = Path(path)
    with replacing(path) as partial:
        write_graph(example, partial, metadata or {}, for_onnx_runtime=True)
        content = partial.read_bytes()
        for optimize in (False, True):  # first node by node, as it is written; then as it will run
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
    """Writes the graph of an example's network, without checking its outputs.

    Args:
        example: The network, and the inputs to trace it with.
        path: Where to write the file.
        metadata: Further metadata for the file.
        form: Turns the prepared network into the module to trace; by default, into its reference graph.
        for_onnx_runtime: Whether to rewrite hard-swishes as products of int8 tensors, PReLUs as LeakyReLUs,
            and all transposed convolutions as plain ones. ONNX Runtime has no int8 kernels for them; OpenVINO
            does, except for a transposed convolution of an input with a zero point.
    """
    import onnx_ir

    from qat_lightning.export.blocks import as_blocks
    from qat_lightning.export.graph import simplify
    from qat_lightning.export.hard_swish import as_products
    from qat_lightning.export.leaky_relu import as_leaky_relus
    from qat_lightning.export.operations import TRANSLATIONS

    with quiet_torch_ao(), quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            returning_fields((form or reference)(example.module)),
            (*example.args, example.kwargs),  # torch takes the last dict, even {}, for keyword arguments
            dynamo=True,
            verbose=False,
            output_names=_output_names(example.outputs),
            custom_translation_table=TRANSLATIONS,
            dynamic_shapes=tree_map(_dynamic, example.kwargs or example.args),
        )
        assert program is not None
        model = as_products(program.model) if for_onnx_runtime else program.model
        model = simplify(as_blocks(model, only_shifted=not for_onnx_runtime))
        model = as_leaky_relus(model) if for_onnx_runtime else model
    model.metadata_props.update({**example.metadata, **metadata})
    onnx_ir.save(model, path)


def _dynamic(value: Any) -> Any:
    """Returns which dimensions of an input may have any size, unless the network needs one size."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return None
    sequences = not (value.is_floating_point() or value.is_complex())
    return dict.fromkeys(range(value.ndim if sequences else 1), torch.export.Dim.AUTO)


def _output_names(outputs: Any) -> list[str]:
    """Names each output tensor by the keys and positions that lead to it: `logits`, `boxes_0`."""
    names = []
    for path, value in tree_flatten_with_path(outputs)[0]:
        if isinstance(value, torch.Tensor):
            keys = [key.key if isinstance(key, MappingKey) else getattr(key, "idx", "") for key in path]
            named = keys and not isinstance(keys[0], int)
            names.append("_".join(map(str, keys if named else ["output", *keys])))
    return names
