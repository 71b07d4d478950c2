"""Recognizes batch-norms whose statistics and factors are fixed buffers, as in torchvision's detectors.

Their own forward multiplies by a tensor with one factor for each channel, which int8 would round with a
single scale. As one batch-norm they are fused into the convolution before them, and each channel keeps its
factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.base import random_state
from qat_lightning.base.torch_internals import buffers_of, modules_of, parameters_of
from qat_lightning.modes.purity.structure import structural_copy

_BUFFERS = ("running_mean", "running_var", "weight", "bias")
_COUNTER = "num_batches_tracked"
_EPS = 1e-5  # of implementations that do not say


class FixedNorm(nn.Module):
    """A batch-norm that computes the same in training and in eval mode, and does not train.

    It is no `torch.nn.BatchNorm2d`, so that nothing unfreezes or synchronizes it.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    affine = track_running_stats = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Ignores the counter in the weights of an ordinary batch-norm, as torchvision's class does."""
        if _COUNTER not in buffers_of(self):
            state_dict.pop(prefix + _COUNTER, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def recognize_fixed_norms(network: nn.Module) -> None:
    """Gives such batch-norms in `network` the class :class:`FixedNorm`, in place. They keep their state."""
    for module in network.modules():
        if _is_fixed_norm(module):
            module.eps = _eps(module)  # type: ignore[assignment]
            module.__class__ = FixedNorm


def _eps(module: nn.Module) -> float:
    found = (getattr(module, name, None) for name in ("eps", "epsilon"))
    return next((eps for eps in found if isinstance(eps, float)), _EPS)


def _is_fixed_norm(module: nn.Module) -> bool:
    """Whether a user-defined module computes a batch-norm of images from its buffers alone."""
    buffers = {name: value for name, value in buffers_of(module).items() if name != _COUNTER}
    if type(module).__module__.startswith("torch.") or isinstance(module, FixedNorm):
        return False
    if set(buffers) != {*_BUFFERS} or modules_of(module) or parameters_of(module):
        return False
    shapes = {None if value is None else value.shape for value in buffers.values()}
    if len(shapes) > 1 or None in shapes or len(next(iter(shapes))) != 1:  # type: ignore[arg-type]
        return False
    return all(_computes_batch_norm(module, training) for training in (True, False))


def _computes_batch_norm(module: nn.Module, training: bool) -> bool:
    """Runs a copy with other values: those of a fresh module would not tell one formula from another."""
    twin, generator = structural_copy(module).train(training), torch.Generator().manual_seed(0)
    channels = buffers_of(twin)["weight"].numel()  # type: ignore[union-attr]
    values = {name: torch.rand(channels, generator=generator) + 0.5 for name in _BUFFERS}
    values["running_var"] *= _EPS  # so that epsilon matters
    buffers_of(twin).update(values)
    x = torch.randn(2, channels, 3, 3, generator=generator)
    mean, var, weight, bias = values.values()
    expected = F.batch_norm(x, mean, var, weight, bias, eps=_eps(module))
    try:
        with torch.no_grad(), random_state.preserved():
            result = twin(x)
    except Exception:  # a user-defined forward may raise anything
        return False
    same_kind = isinstance(result, torch.Tensor) and result.shape == x.shape
    return same_kind and torch.allclose(result, expected, rtol=1e-4, atol=1e-4)
