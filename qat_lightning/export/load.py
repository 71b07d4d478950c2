"""Loads an exported file of any kind as a module that is called like the network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qat_lightning.base import manifest
from qat_lightning.base.errors import Int8FileError
from qat_lightning.export.runtime import OnnxRuntime, OpenVino, Runtime, RuntimeNetwork, quantizes
from qat_lightning.quantize.int8_file import load_int8


def load_runtime(
    path: str | Path, network: nn.Module | None = None, *, threads: int = 0, verify: bool = True
) -> nn.Module:
    """Loads an exported file as a module that takes and returns torch tensors like the network.

    Put the module in the place of the network in a LightningModule. Then `Trainer.test` and your own metrics
    score the very file that you ship::

        module.model = load_runtime("int8.onnx")
        Trainer(accelerator="cpu").test(module, datamodule)

    Args:
        path: A file of :func:`qat_lightning.export_onnx` (`.onnx`), :func:`qat_lightning.export_openvino`
            (`.xml`) or :func:`qat_lightning.save_int8` (`.pt`).
        network: A freshly built float network, only for a file of `save_int8`: such a file holds weights and
            no graph. Do not use the network afterwards.
        threads: Threads of the runtime, by default one for each core. PyTorch's threads are set for the whole
            process instead, by `torch.set_num_threads`.
        verify: Whether to compare the file with the `manifest.json` beside it before anything is parsed.

    Returns:
        The network, in eval mode on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        Int8FileError: The file is of another kind, was altered, or has no manifest.
        MissingExtraError: The extra of the runtime is not installed.
        ValueError: `network` is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".xml", ".pt"):
        raise Int8FileError(f"load_runtime reads .onnx, .xml (OpenVINO) and .pt files, but received {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix != ".pt":
        return RuntimeNetwork(load_graph(path, threads=threads, verify=verify)).eval()
    if network is None:
        raise ValueError(
            f"{path} holds the weights of an int8 network and no graph: pass a freshly built float network, "
            "as in load_runtime(path, build_network())."
        )
    return load_int8(path, network, verify=verify)


def load_graph(path: Path, *, threads: int = 0, verify: bool = True) -> Runtime:
    """Loads an `.onnx` or `.xml` file, with the arguments of :func:`load_runtime`.

    An OpenVINO file without int8 computes in float32 on every CPU. An ONNX file may keep its weights in a
    separate file. No manifest lists that file, so it is read only if `verify` is False.
    """
    content = manifest.read(path, verify=verify)
    if path.suffix == ".onnx":
        return OnnxRuntime(content, threads=threads, folder=None if verify else path.parent)
    weights = manifest.read(path.with_suffix(".bin"), verify=verify)
    return OpenVino(content, weights, threads=threads, float32=not quantizes(content))


def size_of(path: Path) -> int:
    """Returns the size of an exported file in bytes, including OpenVINO's separate weights."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(each.stat().st_size for each in files)
