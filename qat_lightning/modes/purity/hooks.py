"""Refuses networks with forward hooks or computed weights, which fusing would silently drop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qat_lightning.base.torch_internals import all_forward_hooks
from qat_lightning.modes.graph.quantizable import QUANTIZABLE

# transformers registers hooks at the first call of a model. They do nothing unless that call asks for hidden
# states or attentions; then a capture records what they do.
_DORMANT = ("transformers.utils.output_capturing",)
_OLD_NORMS: dict[type, str] = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
_COMPUTED = "which each forward computes anew, so that it cannot be stored as int8. Make it plain first: "


def check_hooks(network: nn.Module) -> None:
    """Raises a `ValueError` if a module has forward hooks, or a weight that each forward computes anew."""
    for name, module in network.named_modules():
        shown = name or type(network).__name__
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{shown!r} has a parametrized weight (weight or spectral norm), {_COMPUTED}"
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
            )
        check_weight(shown, module)
        if not all(map(_is_dormant, all_forward_hooks(module))):
            raise ValueError(
                f"{shown!r} has a forward hook, which fusing and conversion would drop. Remove it before "
                "the network is prepared (handle.remove()). A hook that only observes can be registered on "
                "the prepared network."
            )


def _is_dormant(hook: object) -> bool:
    return getattr(hook, "__module__", None) in _DORMANT


def check_weight(name: str, module: nn.Module) -> None:
    """Raises a `ValueError` if `module` has a weight of torch's old weight or spectral norm."""
    hook: Any
    for hook in all_forward_hooks(module):
        norm = _OLD_NORMS.get(type(hook))
        if norm is not None:
            argument = "" if hook.name == "weight" else f", {hook.name!r}"
            raise ValueError(
                f"{name!r} has a {hook.name} of torch.nn.utils.{norm}, {_COMPUTED}"
                f"torch.nn.utils.remove_{norm}(module{argument})."
            )
    if isinstance(module, QUANTIZABLE) and isinstance(vars(module).get("weight"), torch.Tensor):
        raise ValueError(
            f"{name!r} has a weight that is a plain tensor and no parameter, as a removed hook of "
            "torch.nn.utils.weight_norm leaves it. Call torch.nn.utils.remove_weight_norm(module) while the "
            "hook is there, or make the weight a parameter: weight = module.weight.detach(); "
            "del module.weight; module.weight = torch.nn.Parameter(weight)."
        )
