"""Counts the operations that a runtime still computes in float after it has optimized a file's graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_lightning.export.extras import require

# Operations without arithmetic, by their names in ONNX and in OpenVINO's CPU plugin.
_NO_ARITHMETIC = {
    *("Cast", "Concat", "ConstantOfShape", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad"),
    *("Range", "ReorderInput", "ReorderOutput", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze", "DepthToSpace", "SpaceToDepth"),
    *("Broadcast", "Concatenation", "Const", "Convert", "Input", "MemoryInput", "MemoryOutput", "Output"),
    *("Reorder", "ShapeOf", "StridedSlice"),
}
_TO_INT8 = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinear", "QGemm", "ConvInteger", "MatMulInteger")
_FLOATS = ("f32", "bf16", "f16")


def float_operations_of_onnx(content: bytes, options: Any) -> Counter[str]:
    """Counts the operations that ONNX Runtime computes in float on this CPU, by their names in ONNX.

    Args:
        content: Content of the ONNX file.
        options: Options of the session. They are the same afterwards.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
    """
    require("onnx", "onnxruntime", purpose="Inspecting an ONNX file")
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        try:
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        finally:
            options.optimized_model_filepath = ""
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return Counter(_float_kinds(nodes))


def _float_kinds(nodes: Any) -> list[str]:
    """Returns the kind of each node that computes in float."""
    found: list[str] = []
    integers: set[str] = set()
    for node in nodes:  # in topological order
        kind = node.op_type
        if kind.startswith(_TO_INT8) or (kind != "DequantizeLinear" and integers & set(node.input[:1])):
            integers |= set(node.output)  # a pooling of integers, for example, returns integers
        elif kind not in _NO_ARITHMETIC and kind != "DequantizeLinear":
            found.append(kind)
    return found


def float_operations_of_openvino(compiled: Any, kinds: Mapping[str, str]) -> Counter[str]:
    """Counts the operations that OpenVINO computes in float or bfloat16.

    Args:
        compiled: The compiled model.
        kinds: The type of each operation in the file, by the operation's name. Counts are by these types.
    """
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.value for key, value in operation.get_rt_info().items()}
        kind, names = info["layerType"], info["originalLayersNames"].split(",")
        if info["runtimePrecision"] in _FLOATS and kind not in _NO_ARITHMETIC and kind != "FakeQuantize":
            counts[next((kinds[name] for name in names if name in kinds), kind)] += 1
    return counts


def in_words(operations: Counter[str]) -> str:
    """Describes the float operations in one clause, the most frequent first.

    Example:
        >>> in_words(Counter(Mul=21, HardSigmoid=29))
        '29 HardSigmoid and 21 Mul run in float between int8 layers'
    """
    if not operations:
        return "nothing runs in float between int8 layers"
    *others, last = [f"{count} {kind}" for kind, count in operations.most_common()]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} {'runs' if operations.total() == 1 else 'run'} in float between int8 layers"
