"""The two switches of every fake-quantize, `torch.ao`'s included: one for observing, one for rounding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from qat_lightning.base.subclass import derives_from
from qat_lightning.fake_quant.constructors import Constructible


class Switches(Constructible, nn.Module):
    """The switches of a fake-quantize, as buffers, under the names that `torch.ao` gives them."""

    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    def enable_observer(self, enabled: bool = True) -> None:
        """Switches the observer; `torch.ao.quantization.enable_observer` calls this."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Switches the observer off; `torch.ao.quantization.disable_observer` calls this."""
        self.enable_observer(False)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches the rounding; `torch.ao.quantization.enable_fake_quant` calls this."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Switches the rounding off; `torch.ao.quantization.disable_fake_quant` calls this."""
        self.enable_fake_quant(False)


def is_fake_quantize(module: object) -> bool:
    """Whether `module` is a fake-quantize: one of ours, or of `torch.ao`'s in a user-defined QConfig."""
    return isinstance(module, Switches) or derives_from(module, "torch.ao.", "FakeQuantizeBase")


def known_to_torch_ao(quantization: Any) -> None:
    """Makes functions of `torch.ao.quantization`, such as `disable_observer`, find our fake-quantizes."""
    quantization.FakeQuantizeBase.register(Switches)


if "torch.ao.quantization" in sys.modules:  # torch loads it; nothing here needs it
    known_to_torch_ao(sys.modules["torch.ao.quantization"])
