"""The layers that may become int8: convolutions, transposed ones too, and linear layers."""

from __future__ import annotations

from torch import nn

QUANTIZABLE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def holds_quantizable(module: nn.Module) -> bool:
    """Whether `module` is or contains a convolution or a linear layer."""
    return any(isinstance(child, QUANTIZABLE) for child in module.modules())
