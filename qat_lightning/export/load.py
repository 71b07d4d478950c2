"""Loads every kind of exported file as the same kind of module."""

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

    In the place of the network in a LightningModule, it lets `Trainer.test` and your own metrics score
    the very file that is shipped::

        module.model = load_runtime("int8.onnx")
        Trainer(accelerator="cpu").test(module, datamodule)

    Args:
        path: A file of :func:`qat_lightning.export_onnx` (`.onnx`), :func:`qat_lightning.export_openvino`
            (`.xml`) or :func:`qat_lightning.save_int8` (`.pt`).
        network: For a file of `save_int8` a freshly built float network, which is used up: such a file
            holds weights and no graph.
        threads: Threads of the runtime, by default one for each core. PyTorch's are set for the whole
            process, by `torch.set_num_threads`.
        verify: Whether the file must be the one that the `manifest.json` beside it describes, which is
            checked before anything is parsed.

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
    """Loads an `.onnx` or `.xml` file like :func:`load_runtime`.

    A float file of OpenVINO computes in float32, on whichever CPU. Weights that an ONNX file keeps in a file
    of their own, which no manifest lists, are read only where nothing is verified.
    """
    content = manifest.read(path, verify=verify)
    if path.suffix == ".onnx":
        return OnnxRuntime(content, threads=threads, folder=None if verify else path.parent)
    weights = manifest.read(path.with_suffix(".bin"), verify=verify)
    return OpenVino(content, weights, threads=threads, float32=not quantizes(content))


def size_of(path: Path) -> int:
    """Returns the bytes of an exported file, including OpenVINO's separate weights."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(each.stat().st_size for each in files)
