"""Runs exported files on torch tensors, each by its own runtime."""

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
"""Where ONNX Runtime's name of a type is not torch's."""


class Signature(NamedTuple):
    """The name, type and shape of one input of a file.

    Attributes:
        name: Its name.
        dtype: Type of its elements.
        shape: Its dimensions, None where any size will do.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


class Runtime(Protocol):
    """A loaded file.

    Attributes:
        name: What the runtime is called.
        signatures: The inputs, in the order of the network's own.
        int8: Whether anything in the file is quantized.
        structure: What :func:`qat_lightning.export.structure.structure_of` said of the outputs.
    """

    name: str
    signatures: list[Signature]
    int8: bool
    structure: str | None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Returns the outputs for inputs in the order of `signatures`."""

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that compute in float in the optimized graph."""


class RuntimeNetwork(nn.Module):
    """Replaces the network: takes the same inputs and returns the same structure of torch tensors.

    It has no parameters, computes on the CPU and gives no gradients. Outputs are on the device of the inputs.

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

    A file of this package with activations of 8 bits is computed without overflow on CPUs without VNNI, by
    `session.x64quantprecision=1`; with the runtime's default options, sums overflow there. So they do where
    two layers share a weight, which that option cannot read.

    Args:
        content: The file.
        threads: Threads for one operation; 0 leaves it to the runtime, which takes every core.
        optimize: Whether the runtime may fuse quantize, dequantize and what is between them into int8
            operations. Without, it runs the graph as it is written, node by node.
        folder: Where weights lie that the file keeps in files of their own; None lets it have none.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        Int8FileError: The file is no ONNX file that the runtime can run.
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
            except Exception as error:  # the runtime has a class of its own for each kind of failure
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
        """Returns the outputs for inputs in the order of `signatures`."""
        names = [each.name for each in self.signatures]
        return self._session.run(None, dict(zip(names, arrays, strict=True)))

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that compute in float in the optimized graph."""
        return float_operations_of_onnx(self._content, self._options)


def _session_options(threads: int, optimize: bool, folder: Path | None, wide: bool) -> Any:
    """Returns session options. `wide` adds products of bytes in 32 bits, slower on CPUs without VNNI."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4 if wide else 3  # an attempt may fail
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it holds torch's cores
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
        graph: The `.xml` file.
        weights: The `.bin` file.
        threads: Threads for a request; 0 leaves it to the runtime.
        float32: Whether what is not int8 is computed in float32; by default the runtime takes bfloat16 on
            CPUs that have it.

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
        except Exception as error:  # the runtime has a class of its own for each kind of failure
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
        """Returns the outputs for inputs in the order of `signatures`."""
        results = self._compiled(list(arrays))
        return [np.array(results[output]) for output in self._compiled.outputs]

    def float_operations(self) -> Counter[str]:
        """Counts the operations of each kind that compute in float in the optimized graph."""
        return float_operations_of_openvino(self._compiled, self._kinds)


@cache
def _core() -> Any:
    """Returns the process's only core, which lives until the process ends.

    OpenVINO's CPU plugin takes over the stack that signals are handled on, and gives it back at its end.
    Several that do not end in reverse order leave one that is freed: the next signal is a crash.
    """
    import openvino

    return openvino.Core()


def quantizes(graph: bytes) -> bool:
    """Whether an ONNX or OpenVINO file quantizes anything."""
    return any(kind in graph for kind in (b"QuantizeLinear", b"QLinear", b'"FakeQuantize"'))


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _onnx_dtype(said: str) -> torch.dtype:
    """Returns the torch dtype that ONNX Runtime calls `tensor(…)`."""
    name = said.removeprefix("tensor(").removesuffix(")")
    dtype = _ONNX_DTYPES.get(name) or getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Int8FileError(f"The file takes {said}, but its inputs have to be tensors of numbers.")
    return dtype


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def _openvino_shape(value: Any) -> tuple[int | None, ...]:
    return tuple(None if size.is_dynamic else size.get_length() for size in value.partial_shape)
