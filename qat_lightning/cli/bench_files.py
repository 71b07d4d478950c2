"""Loads the files for `qat-bench`, and makes inputs that all of them take."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat_lightning.base.inputs import Inputs
from qat_lightning.cli import resolvers
from qat_lightning.export.load import load_graph
from qat_lightning.export.runtime import RuntimeNetwork, Signature
from qat_lightning.quantize.int8_file import load_int8
from qat_lightning.quantize.recipe import quantized_networks

_CONFIGS = ("config.yaml", ".hydra/config.yaml")
_GRAPHS = (".onnx", ".xml")


@dataclass(frozen=True)
class BenchFile:
    """A loaded file.

    Attributes:
        path: The file.
        runtime: Name of the runtime.
        network: The network in it, in eval mode on the CPU.
        int8: Whether anything in it is quantized.
        bytes: Its size, including a separate file of weights.
        signatures: Its inputs. None for a `.pt` file, which does not contain them.
        float_operations: The operations that an int8 file runs in float. Empty if they are not known.
    """

    path: Path
    runtime: str
    network: nn.Module
    int8: bool
    bytes: int
    signatures: list[Signature] | None
    float_operations: Counter[str]


def load(path: Path, *, threads: int, verify: bool) -> BenchFile:
    """Loads an exported int8 or float file.

    Args:
        path: An `.onnx` or `.xml` file, or a `.pt` file of a run of `qat-train`. The network of a `.pt` file
            is built from the configuration beside it. The configuration names code to run, so it must be your
            own.
        threads: Threads of the runtime.
        verify: Whether to compare the file with the `manifest.json` beside it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or the network of a `.pt` file cannot be built.
        MissingExtraError: The extra of the runtime is not installed.
    """
    if path.suffix not in (*_GRAPHS, ".pt"):
        raise ValueError(f"qat-bench measures .onnx, .xml (OpenVINO) and .pt files, but received {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".pt":
        network, size = _rebuilt(path, verify=verify), path.stat().st_size
        return BenchFile(path, "PyTorch", network, True, size, None, Counter())
    runtime = load_graph(path, threads=threads, verify=verify)
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    return BenchFile(
        path=path,
        runtime=runtime.name,
        network=RuntimeNetwork(runtime).eval(),
        int8=runtime.int8,
        bytes=sum(each.stat().st_size for each in (path, weights) if each.is_file()),
        signatures=runtime.signatures,
        float_operations=runtime.float_operations() if runtime.int8 else Counter(),
    )


def _rebuilt(path: Path, *, verify: bool) -> nn.Module:
    """Returns the int8 network of a `.pt` file, or the whole module if it holds several."""
    found = [each for each in map(path.parent.joinpath, _CONFIGS) if each.is_file()]
    cfg = OmegaConf.load(found[0]) if found else None
    if not isinstance(cfg, DictConfig) or "classifier" not in cfg:
        raise ValueError(
            f"{path} holds the weights of an int8 network, but no graph. qat-bench builds the network from "
            "the config.yaml that qat-train writes beside it, but there is no config.yaml of a run. Copy it "
            "from the run's folder, or export with export=onnx or export=openvino and measure that file."
        )
    resolvers.register()
    int8 = load_int8(path, instantiate(cfg.classifier, _convert_="all"), verify=verify)
    networks = [network for _, network, _ in quantized_networks(int8)]
    return networks[0] if len(networks) == 1 else int8


def common_signatures(
    files: Sequence[BenchFile], shape: Sequence[int] | None, *, verify: bool
) -> list[Signature]:
    """Returns the inputs that all files take. Every dimension but the batch is known.

    Args:
        files: The files.
        shape: Shape of an input without the batch, for files that leave it open or have no signature.
        verify: As in :func:`load`, for a graph beside a `.pt` file that is read for its signature.

    Raises:
        ValueError: The files take different inputs, or dimensions are missing or wrong.
    """
    known = [(each.path, each.signatures) for each in files if each.signatures is not None]
    known = known or [_signatures_beside(files, shape, verify=verify)]
    (first, common), *others = known
    for path, signatures in others:
        if not _agree(common, signatures):
            raise ValueError(
                f"{first} takes {_described(common)}, but {path} takes {_described(signatures)}. Files can "
                "only be compared if they take the same inputs: measure these one by one."
            )
        common = [
            one._replace(
                shape=tuple(b if a is None else a for a, b in zip(one.shape, other.shape, strict=True))
            )
            for one, other in zip(common, signatures, strict=True)
        ]
    is_open = [None in each.shape[1:] for each in common]
    if shape is not None and not any(is_open):
        is_open[0] = True  # so that `shape` is compared with it
    return [
        _filled(each, shape, first) if to_fill else each
        for each, to_fill in zip(common, is_open, strict=True)
    ]


def batches_of(
    signatures: Sequence[Signature], wanted: Sequence[int] | None, usual: Sequence[int]
) -> list[int]:
    """Returns the batch sizes to measure: the requested ones, the usual ones, or the only possible one.

    Raises:
        ValueError: The files do not take a requested batch size.
    """
    sizes = [each.shape[0] for each in signatures if each.shape]
    if None in sizes:
        return list(wanted or usual)
    only = sizes[0] if sizes else 1
    assert only is not None
    if wanted and set(wanted) != {only}:
        raise ValueError(
            f"The files take {_described(signatures)}, so only a batch of {only}, but received --batch "
            f"{' '.join(map(str, wanted))}. Leave --batch out, or export with a dynamic batch size."
        )
    return [only]


def example_of(signatures: Sequence[Signature], files: Iterable[BenchFile]) -> Inputs:
    """Returns random inputs, by name if a `.pt` file's network knows the names."""
    fixed = {each.shape[0] for each in signatures if each.shape}
    size = next(each for each in count(2) if each not in fixed)  # no other dimension has this size
    values = {each.name: _random(each, size) for each in signatures}
    networks = [each.network for each in files if each.signatures is None]
    if networks and all(_takes(network, values) for network in networks):
        return Inputs((), values)
    return Inputs(tuple(values.values()), {})


def _signatures_beside(
    files: Sequence[BenchFile], shape: Sequence[int] | None, *, verify: bool
) -> tuple[Path, list[Signature]]:
    """Returns a signature with `shape`, or without one the signatures of a graph beside a `.pt` file."""
    first = files[0].path
    if shape is not None:
        return first, [Signature("input", torch.float32, (None, *shape))]
    for path in (each.path.with_suffix(suffix) for each in files for suffix in _GRAPHS):
        if path.is_file():
            return path, load_graph(path, verify=verify).signatures
    raise ValueError(
        f"{first} holds no graph, so its inputs are unknown. Pass the shape of an input without the batch, "
        "as in --shape 3,224,224, or measure it together with its .onnx or .xml file."
    )


def _agree(one: Sequence[Signature], other: Sequence[Signature]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype
        and len(a.shape) == len(b.shape)
        and all(m is None or n is None or m == n for m, n in zip(a.shape, b.shape, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _filled(signature: Signature, shape: Sequence[int] | None, path: Path) -> Signature:
    if shape is None:
        raise ValueError(
            f"{path} takes {_described([signature])}, where ? can be any size. Pass the sizes without the "
            "batch, as in --shape 3,224,224."
        )
    filled = signature._replace(shape=(*signature.shape[:1], *shape))
    if not _agree([signature], [filled]):
        raise ValueError(
            f"{path} takes {_described([signature])}, but received --shape {','.join(map(str, shape))}, "
            "which does not fit: pass the shape without the batch."
        )
    return filled


def _described(signatures: Sequence[Signature]) -> str:
    """Describes inputs like `x float32[?, 3, 224, 224]`, separated by commas."""
    shapes = [", ".join("?" if size is None else str(size) for size in each.shape) for each in signatures]
    dtypes = [str(each.dtype).removeprefix("torch.") for each in signatures]
    return ", ".join(f"{s.name} {d}[{x}]" for s, d, x in zip(signatures, dtypes, shapes, strict=True))


def _random(signature: Signature, size: int) -> torch.Tensor:
    """Returns normal random numbers, or for integers 0, which is a valid index."""
    shape = [size if each is None else each for each in signature.shape]
    if signature.dtype.is_floating_point:
        return torch.randn(shape, dtype=signature.dtype)
    return torch.zeros(shape, dtype=signature.dtype)


def _takes(network: nn.Module, values: dict[str, Any]) -> bool:
    try:
        inspect.signature(network.forward).bind(**values)
    except TypeError:
        return False
    return True
