"""Checks that a network is float and can be prepared."""

from __future__ import annotations

from torch import nn

from qat_lightning.base import torch_internals
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.graph.quantizable import holds_quantizable
from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.quantize.recipe import recipe_of


def check_float(network: nn.Module) -> None:
    """Raises a `ValueError` if `network` is quantized already, is compiled, or holds nothing to quantize."""
    check_not_quantized(network)
    if is_compiled(network):
        raise ValueError(
            "The network is compiled (torch.compile), and a compiled network cannot be prepared. Prepare the "
            "plain network and compile the result: pass trainer.fit(torch.compile(module)), or compile in "
            "the LightningModule's `on_fit_start`, as in self.model.compile()."
        )
    if not holds_quantizable(network):
        kind = type(network).__name__
        raise ValueError(f"{kind} holds no convolution and no linear layer, so there is nothing to quantize.")


def is_compiled(module: nn.Module) -> bool:
    """Returns whether `module` or a submodule is compiled, by `torch.compile` or by `module.compile()`."""
    return any(torch_internals.is_compiled(child) for child in module.modules())


def check_not_quantized(network: nn.Module) -> None:
    """Raises a `ValueError` if `network` is prepared or int8, by this package or by torch.ao."""
    kind = type(network).__name__
    if recipe_of(network) is not None:
        raise ValueError(f"{kind} is quantized already: it was prepared before. Pass a float network.")
    for name, module in network.named_modules():
        if next(fake_quantizes(module), None) is not None and not name:
            raise ValueError(
                f"{kind} is quantized already: it holds fake-quantize modules, so torch.ao or an "
                "earlier call has prepared it. Pass the float network."
            )
        if is_int8(module):
            raise ValueError(
                f"{kind} is quantized already: its {name or kind!r} is the int8 module "
                f"{type(module).__module__}.{type(module).__name__}. Pass the float network; "
                "torchvision's quantizable models take quantize=False."
            )


def is_int8(module: nn.Module) -> bool:
    """Returns whether `module` is an int8 layer, of this package or of torch.ao."""
    if isinstance(module, Int8Layer):
        return True
    package = type(module).__module__
    return package.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")) and not type(
        module
    ).__name__.endswith("FloatFunctional")
