"""The base of the modules of an int8 network: their state is plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qat_lightning.modes.lowering.int8.qparams import QParams

Run = Callable[..., torch.Tensor]


class Lowered(nn.Module):
    """An operation on tensors of bytes.

    The first call makes what the operation computes with (Python numbers, packed weights) from the buffers.
    That is neither copied nor saved, and made anew after buffers were loaded. Threads that make it at the
    same time make the same.

    Args:
        **qparams: Qparams by name; None for a tensor that is float. They become buffers.
    """

    def __init__(self, **qparams: QParams | None) -> None:
        super().__init__()
        self._run: Run | None = None
        self._bounds = {name: (each.low, each.high) for name, each in qparams.items() if each is not None}
        for name, each in qparams.items():
            if each is not None:
                self.register_buffer(f"{name}_scale", torch.tensor(each.scale, dtype=torch.float32))
                self.register_buffer(f"{name}_zero_point", torch.tensor(each.zero_point, dtype=torch.int32))

    def qparams(self, name: str) -> QParams:
        """Returns the qparams that the module was made with, or that were loaded."""
        buffers = (self.get_buffer(f"{name}_{part}").item() for part in ("scale", "zero_point"))
        scale, zero_point = buffers
        return QParams(float(scale), int(zero_point), *self._bounds[name])

    def prepared(self) -> Run:
        """Returns the function that `forward` calls, made from the buffers."""
        raise NotImplementedError

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        run = self._run
        if run is None:
            run = self._run = self.prepared()
        return run(*tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._run = None
