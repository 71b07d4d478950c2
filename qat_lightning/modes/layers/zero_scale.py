"""Replaces batch-norm scales of zero, by which torch.ao's fused training module would divide.

That module multiplies the convolution's weight by the batch-norm's scale, rounds it, and divides the output
by the scale again. Residual branches often start with a scale of zero, and some channels of a trained network
end there. Both would give NaN at the first step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn

_TOO_SMALL = 1e-12
# Far below one int8 step of the output, yet large enough that the weight is not rounded to zero. With a zero
# weight the scale would get no gradient and never change.
_REPLACEMENT = 1e-3


def replace_zero_scales(prepared: nn.Module) -> None:
    """Gives each fused batch-norm in `prepared` a small scale where its own is zero, in place."""
    modules: list[Any] = list(prepared.modules())
    for module in modules:
        divides = hasattr(module, "freeze_bn_stats") and not isinstance(module, FusedConvBn)
        if divides and module.bn.affine:
            scale = module.bn.weight.detach()
            scale.masked_fill_(scale.abs() < _TOO_SMALL, _REPLACEMENT)
