"""Exported files, run on torch tensors by the runtimes they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from qat_lightning.errors import Int8FileError
from qat_lightning.export.extras import require
from qat_lightning.export.structure import STRUCTURE_KEY, restore, tensors_of


class Runtime(Protocol):
    """A loaded file.

    Attributes:
        name: What the runtime is called.
        inputs: Names of the inputs, in the order of the network's own.
        structure: What :func:`qat_lightning.export.structure.structure_of` said of the outputs.
    """

    name: str
    inputs: list[str]
    structure: str | None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs for the inputs in the order of `inputs`."""


class RuntimeNetwork(nn.Module):
    """Stands where the network stood: takes what it took and returns what it returned, as torch tensors.

    It has no parameters, computes on the CPU and gives no gradients. Outputs are on the device of the inputs.

    Args:
        runtime: The loaded file.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the file on the tensors in the arguments, of any batch size."""
        tensors = tensors_of((args, kwargs))
        if len(tensors) != len(self.runtime.inputs):
            raise ValueError(
                f"The file takes {len(self.runtime.inputs)} tensors ({', '.join(self.runtime.inputs)}), but "
                f"received {len(tensors)}. Call it with the arguments of the network that it was made from."
            )
        outputs = self.runtime.run([tensor.detach().cpu().numpy() for tensor in tensors])
        device = tensors[0].device
        return restore([torch.from_numpy(output).to(device) for output in outputs], self.runtime.structure)

    def extra_repr(self) -> str:
        return f"{self.runtime.name}, inputs={self.runtime.inputs}"


class OnnxRuntime:
    """A QDQ graph in ONNX Runtime.

    Args:
        content: The file.
        threads: Threads for one operation; 0 leaves it to the runtime, which takes every core.
        optimize: Whether the runtime may fuse quantize, dequantize and what is between them into int8
            operations. Without, it runs the graph as it is written, node by node.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        Int8FileError: The file is no ONNX file that the runtime can run.
    """

    name = "ONNX Runtime"

    def __init__(self, content: bytes, *, threads: int = 0, optimize: bool = True) -> None:
        require("onnxruntime", purpose="Running an ONNX file")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else it holds torch's cores
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a class of its own for each kind of failure
            raise Int8FileError(f"ONNX Runtime cannot read the file: {error}") from error
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.structure = self._session.get_modelmeta().custom_metadata_map.get(STRUCTURE_KEY)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs for the inputs in the order of `inputs`."""
        return self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))


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
        Int8FileError: The files are none that the runtime can run.
    """

    name = "OpenVINO"

    def __init__(self, graph: bytes, weights: bytes, *, threads: int = 0, float32: bool = False) -> None:
        require("openvino", purpose="Running an OpenVINO file")
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        options |= {"INFERENCE_PRECISION_HINT": "f32"} if float32 else {}
        try:
            core = openvino.Core()
            model = core.read_model(graph, weights)
            self._compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
        except Exception as error:  # the runtime has a class of its own for each kind of failure
            raise Int8FileError(f"OpenVINO cannot read the file: {error}") from error
        self.inputs = [value.any_name for value in model.inputs]
        key = STRUCTURE_KEY.split(".")
        self.structure = model.get_rt_info(key).value if model.has_rt_info(key) else None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs for the inputs in the order of `inputs`."""
        results = self._compiled(list(arrays))
        return [np.array(results[output]) for output in self._compiled.outputs]
