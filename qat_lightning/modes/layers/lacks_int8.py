"""Tells which modules stay float, since their int8 form computes something else."""

from __future__ import annotations

from typing import Any

from torch import nn

from qat_lightning.base.torch_internals import BatchNorm

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def lacks_int8(module: Any) -> bool:
    """Whether torch.ao's int8 form of `module`, or its fusion, computes something else than the module.

    - A batch-norm without running statistics takes those of the batch, in eval mode, too.
    - An instance-norm with running statistics takes those of the input.
    - A PReLU rounds its factors with qparams that training does not simulate.
    """
    if isinstance(module, BatchNorm):
        return module.running_mean is None
    if isinstance(module, _INSTANCE_NORMS):
        return module.track_running_stats
    return isinstance(module, nn.PReLU)
