"""Refuses forwards with side effects, which a trace cannot record.

A trace records only operations on tensors. A random number that the forward draws, or a counter that it
advances, would be frozen at the value it had in the trace. Random numbers and assignments are found after the
trace and undone; a write into a tensor of the network is refused before it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.nested import PLAIN
from qat_lightning.base.torch_internals import buffers_of
from qat_lightning.modes.purity.impure import Impure
from qat_lightning.modes.purity.private_generators import PrivateGenerators
from qat_lightning.modes.purity.writes import RefusedWrites, draw


@contextmanager
def refuse_side_effects(network: nn.Module) -> Iterator[None]:
    """Raises :class:`Impure` if the block, a trace of `network`, has side effects, and undoes them.

    Raises:
        Impure: The forward draws random numbers, or changes the network.
    """
    writes, generators = RefusedWrites(network), PrivateGenerators(network)
    state, random_before = _State(network), random_state.capture()
    try:
        with writes:
            yield
    finally:
        random_after = random_state.capture()
        random_state.restore(random_before)
        changed, drawn = state.undo(), generators.restore()
    if writes.refused:
        raise writes.refused  # the forward has caught it
    if changed:
        raise Impure(f"its forward assigns to {changed[-1][1]!r}, and a graph would not", changed[-1][0])
    if drawn:
        raise draw(drawn[-1][1], drawn[-1][0])
    if not random_state.same_state(random_before, random_after):
        raise Impure("its forward draws random numbers while it is traced, and a graph would repeat them")


class _State:
    """The plain attributes and the buffers of the modules of a network at one moment."""

    def __init__(self, network: nn.Module) -> None:
        modules = [each for each in network.modules() if not isinstance(each, torch.jit.ScriptModule)]
        self.attributes = {
            (module, name): value
            for module in modules
            for name, value in vars(module).items()
            if name != "training"
        }
        self.buffers = {module: dict(buffers_of(module)) for module in modules}

    def undo(self) -> list[tuple[nn.Module, str]]:
        """Restores attributes and buffers; returns the module and the name of each that had changed."""
        changed = []
        for (module, name), value in self.attributes.items():
            now: Any = vars(module).get(name, value)
            plain = isinstance(now, PLAIN) and isinstance(value, PLAIN)
            if isinstance(now, fx.Proxy) or (plain and now != value):
                setattr(module, name, value)
                changed.append((module, name))
        for module in self.buffers:
            for name in [name for name, now in vars(module).items() if isinstance(now, fx.Proxy)]:
                del vars(module)[name]  # the trace made it
                changed.append((module, name))
        for module, kept in self.buffers.items():
            for name, buffer in kept.items():
                if buffers_of(module).get(name) is not buffer or isinstance(vars(module).get(name), fx.Proxy):
                    vars(module).pop(name, None)
                    buffers_of(module)[name] = buffer
                    changed.append((module, name))
        return changed
