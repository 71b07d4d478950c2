"""A prepared network as a QDQ graph in an ONNX file, checked at once against what it was made from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat_lightning.atomic import replacing
from qat_lightning.errors import ConversionError, MissingExtraError
from qat_lightning.modes.reference import reference
from qat_lightning.quiet import quiet_torch_ao
from qat_lightning.ranges import check_observed
from qat_lightning.recipe import quantized_networks


def export_onnx(
    prepared: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any] | None = None,
    *,
    min_sqnr: float = 20.0,
) -> Path:
    """Writes a prepared network as an ONNX file of quantize/dequantize nodes with int8 weights.

    The file is run at once in ONNX Runtime, and its outputs compared with the fake-quant outputs.

    Args:
        prepared: A trained network that :func:`qat_lightning.prepare` made, of either mode, or the
            LightningModule that holds it. It is not changed.
        path: Where to write; the folder is made.
        example_inputs: A tuple of inputs for `forward`, whose first dimension is the batch; the file takes
            any batch size. By default the module's `example_input_array`.
        min_sqnr: Least agreement with the fake-quant outputs, in dB. Both round to one grid, so that they
            differ only where the order of additions tips a rounding over: trained networks reach 40 and
            more, a graph that computes something else stays near 0. An untrained one amplifies each
            difference and lies between.

    Returns:
        The path.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        ValueError: There are no example inputs, or nothing prepared in the module.
        ConversionError: No data passed through the network, or the file does not give its outputs.
    """
    _require_onnx()
    networks = [network for _, network, recipe in quantized_networks(prepared) if not recipe.int8]
    if not networks:
        raise ValueError(
            "export_onnx takes a network that `prepare` made, before `convert`, but received "
            f"{type(prepared).__name__}, which holds none."
        )
    for network in networks:
        check_observed(network)
    inputs = _inputs(prepared, example_inputs)
    path = Path(path)
    with replacing(path) as partial, quiet_torch_ao(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own; what went wrong is seen by running the file
        torch.onnx.export(
            reference(prepared), inputs, partial, dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=_dynamic_batch(inputs),
        )  # fmt: skip
    _check(prepared, inputs, path, min_sqnr)
    return path


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "Exporting to ONNX")


def _inputs(prepared: nn.Module, example_inputs: Sequence[Any] | None) -> tuple[Any, ...]:
    if example_inputs is None:
        example_inputs = getattr(prepared, "example_input_array", None)
    if example_inputs is None:
        raise ValueError(
            "An export needs example inputs, but none were given and the module has no "
            "example_input_array. Pass example_inputs=(batch,)."
        )
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    return tuple(example_inputs)


def _dynamic_batch(inputs: tuple[Any, ...]) -> Any:
    def dynamic(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0
        return {0: torch.export.Dim.AUTO} if batched else None

    return torch.utils._pytree.tree_map(dynamic, inputs)


def _check(prepared: nn.Module, inputs: tuple[Any, ...], path: Path, min_sqnr: float) -> None:
    """Raises if ONNX Runtime does not give the fake-quant outputs."""
    import onnxruntime

    module = copy.deepcopy(prepared).cpu().eval()
    with torch.no_grad():
        expected = [v for v in tree_leaves(module(*inputs)) if isinstance(v, torch.Tensor)]
    options = onnxruntime.SessionOptions()
    # As it is written, node by node: what a runtime's own int8 kernels round is not the file's doing.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tensors = [v.numpy() for v in tree_leaves(inputs) if isinstance(v, torch.Tensor)]
    names = [node.name for node in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, tensors, strict=True)))
    for index, (want, got) in enumerate(zip(expected, outputs, strict=True)):
        found = sqnr(want, torch.from_numpy(got))
        if found < min_sqnr:
            raise ConversionError(
                f"Output {index} of {path} agrees with the fake-quant output to {found:.1f} dB only, below "
                f"{min_sqnr:.0f} dB: the file does not compute what was trained. It is kept for inspection."
            )


def sqnr(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where the two are equal."""
    noise = (signal.double() - approximation.double()).square().mean()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal.double().square().mean() / noise))
