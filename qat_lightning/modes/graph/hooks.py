"""Forward hooks and parametrizations: fusing would drop them without a word, so they are refused."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def check_hooks(network: nn.Module) -> None:
    """Raises a `ValueError` if a module has forward hooks, or a parametrized weight."""
    for name, module in network.named_modules():
        shown = name or type(network).__name__
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{shown!r} has a parametrized weight (weight or spectral norm), which is computed anew at "
                "each forward and cannot be stored as int8. Make it plain first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"{shown!r} has a forward hook, which fusing and conversion would drop. Remove it before "
                "the network is prepared (handle.remove()), and register it on the prepared network if it "
                "only looks; torch.nn.utils.weight_norm and spectral_norm are hooks, too."
            )
