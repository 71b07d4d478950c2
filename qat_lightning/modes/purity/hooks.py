"""Refuses networks with forward hooks or parametrizations, which fusing would silently drop."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from qat_lightning.base.torch_internals import all_forward_hooks

# transformers registers hooks at the first call of a model. They do nothing unless that call asks for hidden
# states or attentions; then a capture records what they do.
_DORMANT = ("transformers.utils.output_capturing",)


def check_hooks(network: nn.Module) -> None:
    """Raises a `ValueError` if a module has forward hooks, or a parametrized weight."""
    for name, module in network.named_modules():
        shown = name or type(network).__name__
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{shown!r} has a parametrized weight (weight or spectral norm), which each forward computes "
                "anew, so that it cannot be stored as int8. Make it plain first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
            )
        if not all(map(_is_dormant, all_forward_hooks(module))):
            raise ValueError(
                f"{shown!r} has a forward hook, which fusing and conversion would drop. Remove it before "
                "the network is prepared (handle.remove()). A hook that only observes can be registered on "
                "the prepared network. torch.nn.utils.weight_norm and spectral_norm are hooks, too."
            )


def _is_dormant(hook: object) -> bool:
    return getattr(hook, "__module__", None) in _DORMANT
