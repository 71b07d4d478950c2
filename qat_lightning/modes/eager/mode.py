"""Eager mode: runs the network's own code, with the QuantStubs that its author wrote."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn import intrinsic as nni
from torch.ao.nn import qat as nnqat
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import qat as nniqat
from torch.ao.nn.intrinsic import quantized as nniq

from qat_lightning.base.inputs import Inputs
from qat_lightning.fake_quant.switches import known_to_torch_ao
from qat_lightning.modes.base import ModeResult, Options
from qat_lightning.modes.eager.float_parts import compute_in_float, keep_float
from qat_lightning.modes.eager.fusion import check_groups, find_groups
from qat_lightning.modes.eager.number_sums import (
    FloatAddingQFunctional,
    RoundingFloatFunctional,
    round_sums_with_numbers,
)
from qat_lightning.modes.eager.qconfigs import eager_override, eager_qconfigs
from qat_lightning.modes.eager.relu6_calls import hard_sigmoids, replace_relu6_calls
from qat_lightning.modes.eager.training_classes import use_torch_ao_classes, use_training_classes
from qat_lightning.modes.graph.lines import forward_line
from qat_lightning.modes.graph.relu6 import is_inside, replace_relu6_modules
from qat_lightning.modes.layers.in_place import round_in_place
from qat_lightning.modes.layers.input_qparams import connect_inputs_by_trace
from qat_lightning.modes.purity.hooks import check_weight

known_to_torch_ao(ao)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# torch.ao has training modules for one-dimensional convolutions, but its mappings for eager mode lack them.
_TRAINED = ao.get_default_qat_module_mappings() | {nn.Conv1d: nnqat.Conv1d, nni.ConvReLU1d: nniqat.ConvReLU1d}
_CONVERTED = ao.get_default_static_quant_module_mappings() | {
    nnqat.Conv1d: nnq.Conv1d,
    nniqat.ConvReLU1d: nniq.ConvReLU1d,
    RoundingFloatFunctional: FloatAddingQFunctional,
}


class EagerMode:
    """`fuse_modules_qat`, `prepare_qat` and `convert`, in place."""

    name = "eager"

    def check(self, network: nn.Module, options: Options) -> Options:
        """Raises if `network` lacks stubs or cannot be fused; returns `options` with the groups to fuse."""
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
                "    x = self.quant(x); …; return self.dequant(x)            # in forward\n"
                f"  at {forward_line(network)}"
            )
        if options.operations:
            raise ValueError(
                f"operations declares {next(iter(options.operations))!r}, but in eager mode {kind} runs its "
                "own code, and has no graph in which to find operations. Use mode='fx'."
            )
        for name, module in network.named_modules():
            if not is_inside(name, options.keep_float):
                check_weight(name or kind, module)
        if options.fuse != "auto":
            return replace(options, fuse=check_groups(network, options))
        if _owns_fuse_model(network):
            return options
        return replace(options, fuse=find_groups(network, options))

    def functions(
        self, network: nn.Module, untraceable: str, example: Inputs | None, declared: frozenset[str]
    ) -> None:
        """Returns None: eager mode has no graph to find functions in."""

    def prepares_in_place(self, network: nn.Module) -> bool:
        """Returns True: the network runs its own code."""
        return True

    def prepare(self, network: nn.Module, options: Options) -> ModeResult:
        """Fuses and prepares `network` in place."""
        modes = {module: module.training for module in network.modules()}
        network.train()  # torch.ao fuses and prepares for QAT in training mode only
        relu6 = 0
        if options.replace_relu6:
            kept = (*options.keep_float, *hard_sigmoids(network))
            relu6 = replace_relu6_modules(network, kept) + replace_relu6_calls(network, kept)
        if options.fuse == "auto":
            _call_fuse_model(network)
        elif options.fuse:
            ao.fuse_modules_qat(network, [list(group) for group in options.fuse], inplace=True)
        configs = eager_qconfigs(options.backend, options.qconfig)
        configs |= dict.fromkeys(_DROPOUTS)  # int8 has no rounding there
        configs |= {name: eager_override(value) for name, value in options.overrides.items()}
        for name in options.keep_float:
            keep_float(network.get_submodule(name), configs[""])
        ao.propagate_qconfig_(network, configs)
        compute_in_float(network)
        ao.convert(network, _TRAINED, inplace=True, remove_qconfig=False)
        ao.prepare(network, observer_non_leaf_module_list=set(_TRAINED.values()), inplace=True)
        network.train()
        round_sums_with_numbers(network)
        use_training_classes(network)
        round_in_place(network)
        connect_inputs_by_trace(network)
        for module, training in modes.items():
            module.training = training
        return ModeResult(network, relu6=relu6)

    def convert(self, prepared: nn.Module, unseen: Collection[str], lowering: str) -> nn.Module:
        """Converts a prepared network in place."""
        use_torch_ao_classes(prepared)
        return ao.convert(prepared, _CONVERTED, inplace=True)


def _holds(network: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in network.modules())


def _owns_fuse_model(network: nn.Module) -> bool:
    return callable(getattr(network, "fuse_model", None))


def _call_fuse_model(network: nn.Module) -> None:
    """Calls the network's `fuse_model` if there is one, with `is_qat=True` if it accepts that argument."""
    if not _owns_fuse_model(network):
        return
    fuse_model: Any = network.fuse_model
    if "is_qat" in inspect.signature(fuse_model).parameters:
        fuse_model(is_qat=True)
    else:
        fuse_model()
