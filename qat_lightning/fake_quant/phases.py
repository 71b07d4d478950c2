"""Switches for the modules of a prepared network: observers, rounding and batch-norm statistics."""

from __future__ import annotations

from typing import Any

from torch import nn

from qat_lightning.base.schedule import Phase
from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes


def set_enabled(module: nn.Module, *, observer: bool, fake_quant: bool) -> None:
    """Switches the observer and the rounding of every fake-quantize in `module` on or off."""
    for _, child in fake_quantizes(module):
        child.enable_observer(observer)
        child.enable_fake_quant(fake_quant)


def enter(module: nn.Module, phase: Phase) -> None:
    """Switches every fake-quantize and batch-norm in a `module` in training mode to a phase of a run.

    The ranges of weights keep following the weights when the observers freeze. A folded weight with a frozen
    range would diverge while batch-norm's statistics still move: clipping a channel lowers its variance, so
    that its factor grows, and more of it is clipped.
    """
    for _, child in fake_quantizes(module):
        is_weight = isinstance(child, FakeQuantize) and child.axis is not None
        child.enable_observer(phase.observe or is_weight)
        child.enable_fake_quant(phase.fake_quant)
    freeze_bn_statistics(module, frozen=phase.freeze_bn)


def only_observe(module: nn.Module) -> None:
    """Makes the fake-quantizes of a module in eval mode observe without rounding: for calibration."""
    set_enabled(module, observer=True, fake_quant=False)
    for _, child in fake_quantizes(module):
        child.train()


def average_over(module: nn.Module, batches: int | None) -> None:
    """Makes moving averages in `module` plain means over `batches`, counting the next one; None ends this."""
    for _, child in fake_quantizes(module):
        if isinstance(child, FakeQuantize):
            child.average_over(batches)


def set_eval(module: nn.Module) -> None:
    """Puts `module` into eval mode, with its fake-quantizes.

    `eval` alone does not reach them all: fused modules with frozen statistics do not pass it on.
    """
    module.eval()
    for _, child in fake_quantizes(module):
        child.eval()


def keep_inputs(module: nn.Module) -> None:
    """Stops the fake-quantizes in `module` from overwriting their inputs.

    A network that is compiled in pieces may need a tensor for its gradient that the plain layer does not.
    """
    for _, child in fake_quantizes(module):
        if isinstance(child, FakeQuantize):
            child.in_place = False


def freeze_bn_statistics(module: nn.Module, *, frozen: bool) -> None:
    """Freezes or releases the statistics of every batch-norm in a `module` in training mode.

    In a fused module this sets a Python attribute, which is absent from the state dict. In a batch-norm that
    was not fused it sets the train or eval mode.
    """
    inside_fused = set()
    child: Any
    for child in module.modules():
        if hasattr(child, "freeze_bn_stats"):
            inside_fused.add(child.bn)
            if child.freeze_bn != frozen:
                child.freeze_bn_stats() if frozen else child.update_bn_stats()
    for parent in module.modules():  # the parent's mode exempts networks in eval mode, such as a teacher
        for child in parent.children():
            if isinstance(child, BatchNorm) and child not in inside_fused:
                child.train(not frozen and parent.training)


class ObserversOff:
    """Switches observers off while a loop only evaluates, and restores the state of each afterwards."""

    def __init__(self) -> None:
        self._flags: dict[Any, bool] = {}

    def enter(self, module: nn.Module) -> None:
        """Remembers each observer's flag, then switches it off. A second call keeps the first flags."""
        for _, child in fake_quantizes(module):
            self._flags.setdefault(child, bool(child.observer_enabled.any()))
            child.enable_observer(False)

    def leave(self) -> None:
        """Restores the flags that `enter` remembered."""
        for child, flag in self._flags.items():
            child.enable_observer(flag)
        self._flags.clear()
