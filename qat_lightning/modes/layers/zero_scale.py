"""Batch-norm scales of zero: torch.ao's fused training module divides by them.

It multiplies the convolution's weight by the batch-norm's scale, rounds it, and divides the output by
the scale again. Residual branches often start with a scale of zero, and in a trained network some
channels end there: both would give NaN at the first step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn

_TOO_SMALL = 1e-12
# Far below one int8 step of the output, and large enough for rounding to leave something of the
# weight, without which the scale would get no gradient and stay where it is.
_REPLACEMENT = 1e-3


def replace_zero_scales(prepared: nn.Module) -> None:
    """Gives every fused batch-norm in `prepared` a small scale where it has none, in place."""
    modules: list[Any] = list(prepared.modules())
    for module in modules:
        divides = hasattr(module, "freeze_bn_stats") and not isinstance(module, FusedConvBn)
        if divides and module.bn.affine:
            scale = module.bn.weight.detach()
            scale.masked_fill_(scale.abs() < _TOO_SMALL, _REPLACEMENT)
