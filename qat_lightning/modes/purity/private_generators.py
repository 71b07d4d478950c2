"""Restores the random generators that a network holds, after a trace has drawn from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from qat_lightning.base.random_state import same_state
from qat_lightning.modes.purity.structure import held


class PrivateGenerators:
    """The generators that a network holds, and their states at one moment."""

    def __init__(self, network: nn.Module) -> None:
        self._held = [
            (module, name, each, state)
            for module, name, each in held(network)
            if (state := _state(each)) is not None
        ]

    def restore(self) -> list[tuple[nn.Module, str]]:
        """Restores the generators; returns the module and the name of each that had advanced."""
        advanced = []
        for module, name, generator, state in self._held:
            if not same_state(state, _state(generator)):
                _set_state(generator, state)
                advanced.append((module, name))
        return advanced


def _state(value: Any) -> Any:
    """Returns the state of a generator; None for anything else."""
    if isinstance(value, torch.Generator | np.random.RandomState):
        return value.get_state()
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
