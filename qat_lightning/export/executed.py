"""Counts the operations that a runtime still computes in float after it has optimized a file's graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_lightning.export.extras import require

# What takes no arithmetic, in the words of ONNX and of OpenVINO's CPU plugin.
_MOVES = {
    *("Cast", "Concat", "ConstantOfShape", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad"),
    *("Range", "ReorderInput", "ReorderOutput", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze", "DepthToSpace", "SpaceToDepth"),
    *("Broadcast", "Concatenation", "Const", "Convert", "Input", "MemoryInput", "MemoryOutput", "Output"),
    *("Reorder", "ShapeOf", "StridedSlice"),
}
_TO_INT8 = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinear", "QGemm", "ConvInteger", "MatMulInteger")
_FLOATS = ("f32", "bf16", "f16")


def float_operations_of_onnx(content: bytes, options: Any) -> Counter[str]:
    """Counts, by ONNX's names, the operations that ONNX Runtime computes in float on this CPU.

    Args:
        content: The file.
        options: The session's, which are left as they were.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
    """
    require("onnx", "onnxruntime", purpose="Looking into an ONNX file")
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
    return Counter(_floats(nodes))


def _floats(nodes: Any) -> list[str]:
    found: list[str] = []
    integers: set[str] = set()
    for node in nodes:  # each after those that it reads
        kind = node.op_type
        if kind.startswith(_TO_INT8) or (kind != "DequantizeLinear" and integers & set(node.input[:1])):
            integers |= set(node.output)  # a pooling of integers gives integers
        elif kind not in _MOVES and kind != "DequantizeLinear":
            found.append(kind)
    return found


def float_operations_of_openvino(compiled: Any, kinds: Mapping[str, str]) -> Counter[str]:
    """Counts the operations that OpenVINO computes in float or bfloat16.

    Args:
        compiled: The compiled model.
        kinds: Types of the operations of the file, by name, by which those that run are counted.
    """
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        said = {key: value.value for key, value in operation.get_rt_info().items()}
        kind, names = said["layerType"], said["originalLayersNames"].split(",")
        if said["runtimePrecision"] in _FLOATS and kind not in _MOVES and kind != "FakeQuantize":
            counts[next((kinds[name] for name in names if name in kinds), kind)] += 1
    return counts


def in_words(operations: Counter[str]) -> str:
    """Lists the float operations in words, the most frequent first.

    Example:
        >>> in_words(Counter(Mul=21, HardSigmoid=29))
        '29 HardSigmoid and 21 Mul run in float between int8 layers'
    """
    if not operations:
        return "nothing runs in float between int8 layers"
    *others, last = [f"{count} {kind}" for kind, count in operations.most_common()]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} {'runs' if operations.total() == 1 else 'run'} in float between int8 layers"
