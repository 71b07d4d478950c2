"""Runs exported files on torch tensors, in ONNX Runtime or OpenVINO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from qat_lightning.base import cpu
from qat_lightning.base.errors import Int8FileError
from qat_lightning.export.executed import float_operations_of_onnx, float_operations_of_openvino
from qat_lightning.export.extras import require
from qat_lightning.export.structure import STRUCTURE_KEY, restore, tensors_of
from qat_lightning.quantize.recipe import FULL_BYTES

_ONNX_DTYPES = {"float": torch.float32, "double": torch.float64}
"""The types that ONNX Runtime and torch name differently."""


class Signature(NamedTuple):
    """The name, type and shape of one input of a file.

    Attributes:
        name: Name of the input.
        dtype: Type of its elements.
        shape: Its dimensions. None stands for any size.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


class Runtime(Protocol):
    """An exported file that a runtime has loaded.

    Attributes:
        name: Name of the runtime.
        signatures: The inputs, in the order of the network's inputs.
        int8: Whether anything in the file is quantized.
        structure: What :func:`qat_lightning.export.structure.structure_of` returned for the outputs; None if
            the file does not contain it.
    """

    name: str
    signatures: list[Signature]
    int8: bool
    structure: str | None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Returns the outputs. The inputs are in the order of `signatures`."""

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that the runtime computes in float in its optimized graph."""


class RuntimeNetwork(nn.Module):
    """Replaces the network: takes the same inputs, and returns torch tensors in the same structure.

    It has no parameters, runs on the CPU and computes no gradients. Outputs are on the device of the inputs.

    Args:
        runtime: The loaded file.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the file on the tensors in the arguments, with any batch size."""
        tensors = tensors_of((args, kwargs))
        names = [each.name for each in self.runtime.signatures]
        if len(tensors) != len(names):
            raise ValueError(
                f"The file takes {len(names)} tensors ({', '.join(names)}), but received {len(tensors)}. "
                "Call it with the arguments of the network that it was made from."
            )
        outputs = self.runtime.run([tensor.detach().cpu().numpy() for tensor in tensors])
        device = tensors[0].device
        return restore([torch.from_numpy(output).to(device) for output in outputs], self.runtime.structure)

    def extra_repr(self) -> str:
        return f"{self.runtime.name}, inputs={[each.name for each in self.runtime.signatures]}"


class OnnxRuntime:
    """A QDQ graph in ONNX Runtime.

    On CPUs without VNNI, sums of 8-bit activations overflow with the runtime's default options. A file of
    this package with such activations runs there with `session.x64quantprecision=1`, which avoids the
    overflow. If two layers share a weight, the runtime cannot load the file with that option. It then runs
    with the default options, and sums may overflow.

    Args:
        content: Content of the ONNX file.
        threads: Threads for one operation. 0 leaves the choice to the runtime, which uses every core.
        optimize: Whether the runtime may fuse quantize, dequantize and the operations between them into int8
            operations. If False, it runs the graph node by node, as it is written.
        folder: Folder of the weights, for a file that keeps them in separate files. With None, separate
            weights are not read.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        Int8FileError: The runtime cannot run the file.
    """

    name = "ONNX Runtime"

    def __init__(
        self, content: bytes, *, threads: int = 0, optimize: bool = True, folder: Path | None = None
    ) -> None:
        require("onnxruntime", purpose="Running an ONNX file")
        import onnxruntime

        start = partial(onnxruntime.InferenceSession, content, providers=["CPUExecutionProvider"])
        overflows = FULL_BYTES.encode() in content and cpu.overflows()
        for wide in (True, False) if overflows else (False,):
            options = _session_options(threads, optimize, folder, wide)
            try:
                self._session = start(options)
                break
            except Exception as error:  # the runtime has a separate class for each kind of failure
                if not wide:
                    raise Int8FileError(f"ONNX Runtime cannot read the file: {error}") from error
        self._content, self._options = content, options
        self.int8 = quantizes(content)
        self.signatures = [
            Signature(node.name, _onnx_dtype(node.type), tuple(map(_known, node.shape)))
            for node in self._session.get_inputs()
        ]
        self.structure = self._session.get_modelmeta().custom_metadata_map.get(STRUCTURE_KEY)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Returns the outputs. The inputs are in the order of `signatures`."""
        names = [each.name for each in self.signatures]
        return self._session.run(None, dict(zip(names, arrays, strict=True)))

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that the runtime computes in float in its optimized graph."""
        return float_operations_of_onnx(self._content, self._options)


def _session_options(threads: int, optimize: bool, folder: Path | None, wide: bool) -> Any:
    """Returns session options. `wide` adds products of bytes in 32 bits, which is slower without VNNI."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4 if wide else 3  # the first attempt may fail
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle threads occupy cores
    if wide:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder.absolute()))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class OpenVino:
    """An OpenVINO IR.

    Args:
        graph: Content of the `.xml` file.
        weights: Content of the `.bin` file.
        threads: Threads for a request. 0 leaves the choice to the runtime.
        float32: Whether operations that are not int8 compute in float32. By default the runtime uses bfloat16
            on CPUs that support it.

    Raises:
        MissingExtraError: The extra `openvino` is not installed.
        Int8FileError: The runtime cannot run the files.
    """

    name = "OpenVINO"

    def __init__(self, graph: bytes, weights: bytes, *, threads: int = 0, float32: bool = False) -> None:
        require("openvino", purpose="Running an OpenVINO file")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        options |= {"INFERENCE_PRECISION_HINT": "f32"} if float32 else {}
        try:
            core = _core()
            model = core.read_model(graph, weights)
            self._compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
        except Exception as error:  # the runtime has a separate class for each kind of failure
            raise Int8FileError(f"OpenVINO cannot read the file: {error}") from error
        self.int8 = quantizes(graph)
        self._kinds = {each.get_friendly_name(): each.get_type_name() for each in model.get_ops()}
        self.signatures = [
            Signature(value.any_name, _torch_dtype(value.element_type.to_dtype()), _openvino_shape(value))
            for value in model.inputs
        ]
        key = STRUCTURE_KEY.split(".")
        self.structure = model.get_rt_info(key).value if model.has_rt_info(key) else None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Returns the outputs. The inputs are in the order of `signatures`."""
        results = self._compiled(list(arrays))
        return [np.array(results[output]) for output in self._compiled.outputs]

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that the runtime computes in float in its optimized graph."""
        return float_operations_of_openvino(self._compiled, self._kinds)


@cache
def _core() -> Any:
    """Returns the only OpenVINO core of this process. It lives until the process ends.

    OpenVINO's CPU plugin replaces the stack for signal handlers, and restores the previous one when it is
    destroyed. If several are not destroyed in reverse order, a freed stack stays installed, and the next
    signal crashes the process.
    """
    import openvino

    return openvino.Core()


def quantizes(graph: bytes) -> bool:
    """Returns whether an ONNX or OpenVINO file quantizes anything."""
    return any(kind in graph for kind in (b"QuantizeLinear", b"QLinear", b'"FakeQuantize"'))


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _onnx_dtype(onnx_type: str) -> torch.dtype:
    """Returns the torch dtype of a type that ONNX Runtime calls `tensor(…)`."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    dtype = _ONNX_DTYPES.get(name) or getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Int8FileError(f"The file takes {onnx_type}, but its inputs must be tensors of numbers.")
    return dtype


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def _openvino_shape(value: Any) -> tuple[int | None, ...]:
    return tuple(None if size.is_dynamic else size.get_length() for size in value.partial_shape)
