"""Eager mode: the network's own code runs, with the stubs and the fusions that its author wrote."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn.intrinsic import _FusedModule
from torch.nn.modules.conv import _ConvTransposeNd

from qat_lightning.errors import nearest
from qat_lightning.modes.base import Made, Options
from qat_lightning.modes.conv_bn import use_undivided
from qat_lightning.modes.in_place import round_in_place
from qat_lightning.modes.qconfig import eager_qconfigs, override_qconfig
from qat_lightning.modes.relu6 import is_inside, replace_relu6_modules

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class EagerMode:
    """`fuse_modules_qat`, `prepare_qat` and `convert`, in place."""

    name = "eager"

    def check(self, network: nn.Module, options: Options) -> None:
        """Raises if `network` lacks what eager mode leaves to its author: stubs and fusions."""
        kind = type(network).__name__
        stubs = [ao.QuantStub, ao.DeQuantStub]
        missing = [
            s.__name__ for s in stubs if not _holds(network, s) and not _holds(network, ao.QuantWrapper)
        ]
        if missing:
            raise ValueError(
                f"Eager mode needs QuantStub and DeQuantStub where int8 begins and ends, but {kind} "
                f"has no {' and no '.join(missing)}. Use mode='fx', which needs none, or write them:\n"
                "    self.quant, self.dequant = QuantStub(), DeQuantStub()   # in __init__\n"
                "    x = self.quant(x); …; return self.dequant(x)            # in forward"
            )
        if options.fuse == "auto":
            self._check_fusable(network)
        else:
            _check_groups(network, options.fuse)

    def _check_fusable(self, network: nn.Module) -> None:
        fused = _owns_fuse_model(network)
        norms = [n for n, m in network.named_modules() if isinstance(m, _BATCH_NORMS)]
        if norms and not fused:
            raise ValueError(
                "In eager mode BatchNorm has to be fused into the layer before it, and fuse='auto' "
                f"calls the network's own fuse_model(), but {type(network).__name__} has none; its "
                f"BatchNorm layers are {norms[:3]}{' …' if len(norms) > 3 else ''}. List the fusions, "
                "as in fuse=[['conv1', 'bn1', 'relu1'], …], write a fuse_model, or use mode='fx', "
                "which finds them."
            )

    def functions(self, network: nn.Module, untraceable: str) -> None:
        """Says that there is no graph to find functions in."""

    def prepare(self, network: nn.Module, options: Options) -> Made:
        """Fuses and prepares `network` in place."""
        modes = {module: module.training for module in network.modules()}
        network.train()  # torch.ao fuses and prepares for QAT in training mode only
        if options.replace_relu6:
            replace_relu6_modules(network, options.keep_float)
        if options.fuse == "auto":
            _call_fuse_model(network)
        elif options.fuse:
            ao.fuse_modules_qat(network, [list(group) for group in options.fuse], inplace=True)
        configs = eager_qconfigs(options.backend, options.qconfig)
        configs |= dict.fromkeys(_DROPOUTS)  # int8 has no rounding there
        configs |= {name: override_qconfig(value) for name, value in options.overrides.items()}
        transposed = [n for n, m in network.named_modules() if isinstance(m, _ConvTransposeNd)]
        for name in (*options.keep_float, *(n for n in transposed if not is_inside(n, options.keep_float))):
            _keep_float(network.get_submodule(name), configs[""])
        ao.propagate_qconfig_(network, configs)
        ao.convert(network, ao.get_default_qat_module_mappings(), inplace=True, remove_qconfig=False)
        ao.prepare(
            network,
            observer_non_leaf_module_list=set(ao.get_default_qat_module_mappings().values()),
            inplace=True,
        )
        network.train()
        use_undivided(network)
        round_in_place(network)
        for module, training in modes.items():
            module.training = training
        return Made(network)

    def convert(self, prepared: nn.Module) -> nn.Module:
        """Converts a prepared network in place."""
        return ao.convert(prepared, inplace=True)


def _holds(network: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in network.modules())


def _owns_fuse_model(network: nn.Module) -> bool:
    return callable(getattr(network, "fuse_model", None))


def _call_fuse_model(network: nn.Module) -> None:
    """Calls the network's `fuse_model`, with `is_qat=True` where it takes that, as torchvision's do."""
    if not _owns_fuse_model(network):
        return
    fuse_model: Any = network.fuse_model
    if "is_qat" in inspect.signature(fuse_model).parameters:
        fuse_model(is_qat=True)
    else:
        fuse_model()


def _check_groups(network: nn.Module, groups: str | Sequence[Sequence[str]]) -> None:
    if isinstance(groups, str) or any(isinstance(group, str) for group in groups):
        raise TypeError(
            "fuse must be 'auto' or a list of groups of module names, as in "
            f"[['conv1', 'bn1', 'relu1']], but received {groups!r}."
        )
    known = {name for name, _ in network.named_modules(remove_duplicate=False) if name}
    for name in (name for group in groups for name in group):
        if name not in known:
            raise ValueError(
                f"fuse names the module {name!r}, which {type(network).__name__} does not have. "
                f"{nearest(name, known)}"
            )


def _keep_float(module: nn.Module, qconfig: Any) -> None:
    """Keeps `module` float between int8 neighbours: its inputs are dequantized, its output quantized.

    Hooks and a stub do it, so that the names of the parameters stay.
    """
    for child in module.modules():
        child.qconfig = None  # type: ignore[assignment]
    if isinstance(module, _FusedModule):
        # torch.ao does not look inside a fused one.
        module.__class__ = nn.Sequential  # type: ignore[assignment]
    module.requantize = ao.QuantStub(qconfig)
    module.register_forward_pre_hook(_dequantize_inputs, with_kwargs=True)
    if type(module).forward is not nn.Sequential.forward:  # which runs the stub as its last layer
        module.register_forward_hook(_quantize_output)


def _dequantize_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def floating(value: Any) -> Any:
        return value.dequantize() if isinstance(value, torch.Tensor) and value.is_quantized else value

    return tuple(floating(a) for a in args), {key: floating(a) for key, a in kwargs.items()}


def _quantize_output(module: Any, args: Any, output: Any) -> Any:
    return module.requantize(output)
