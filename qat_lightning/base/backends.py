"""The int8 engines of PyTorch: their names, and how to run a network on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_lightning.base.errors import nearest

_RUNTIMES = ("onnxruntime", "openvino")
BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn", *_RUNTIMES)
"""The engines of PyTorch, and the runtimes that a network can be trained for."""
_WITH_QUANTIZED_DTYPES = ("fbgemm", "qnnpack")


def runs_on_plain_tensors(backend: str) -> bool:
    """Whether int8 networks of fx mode compute with plain tensors, not with quantized dtypes."""
    return backend not in _WITH_QUANTIZED_DTYPES


def engine_of(backend: str) -> str:
    """Returns the engine on which PyTorch runs the int8 network of a backend."""
    if backend not in _RUNTIMES:
        return backend
    return "onednn" if "onednn" in torch.backends.quantized.supported_engines else "qnnpack"


def check_backend(backend: str) -> str:
    """Returns `backend` if it exists and this build of PyTorch can run it.

    Raises:
        ValueError: It is unknown, or this build of PyTorch lacks its engine.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {BACKENDS}, but received {backend!r}. {nearest(str(backend), BACKENDS)}"
        )
    supported = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if engine_of(backend) not in supported:
        raise ValueError(
            f"backend={backend!r} needs an engine that this build of PyTorch lacks; it has "
            f"{supported}. Choose one of those."
        )
    return backend


@contextmanager
def engine(backend: str) -> Iterator[None]:
    """Makes the engine of `backend` the quantized engine of PyTorch inside the `with` block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine_of(backend)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def run_on_engine(module: nn.Module, backend: str) -> None:
    """Makes every forward of an int8 `module` run on the engine it was converted for.

    The engine is a global setting of PyTorch. A program with two int8 networks has to set it for each call.
    Forward hooks do that, so `forward` itself is not replaced.
    """
    switch = _EngineSwitch(engine_of(backend))
    module.register_forward_pre_hook(switch.enter)
    module.register_forward_hook(switch.leave, always_call=True)


def run_on_cpu(module: nn.Module) -> None:
    """Makes every forward of an int8 `module` refuse tensors on other devices, with an error that says so."""
    module.register_forward_pre_hook(_refuse_other_devices)


def _refuse_other_devices(module: nn.Module, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise RuntimeError(
                f"Int8 networks run on the CPU, but {type(module).__name__} received a tensor on "
                f"{value.device}. Pass x.cpu(), and test with Trainer(accelerator='cpu')."
            )


class _EngineSwitch:
    """The two hooks of :func:`run_on_engine`. They keep a stack, because int8 networks may be nested.

    The hooks switch `torch.use_deterministic_algorithms` off during the forward. It rejects a tensor that
    fbgemm's linear layer allocates and fills, although integer sums are deterministic anyway.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._before: list[tuple[str, int]] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before.append((torch.backends.quantized.engine, torch.get_deterministic_debug_mode()))
        torch.backends.quantized.engine = self.backend
        torch.set_deterministic_debug_mode("default")
        _refuse_other_devices(module, args)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.backends.quantized.engine, deterministic = self._before.pop()
        torch.set_deterministic_debug_mode(deterministic)
