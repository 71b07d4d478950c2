"""Layers, norms and weights in forms that torch.ao does not know, each held to its right numbers.

A fake-quantized network in eval mode and its int8 form agree, as does what `load_int8` makes of its file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning import preflight, prepare
from qat_lightning.base.errors import PreflightError
from qat_lightning.quantize.copies import copy_of

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def weight_normed() -> nn.Sequential:
    """A network with torch's old weight norm, which has run."""
    network = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 2, 1))
    network(torch.randn(2, 4, 16))
    return network


def test_a_copy_of_an_old_weight_norm_computes_its_weight_anew() -> None:
    network, x = weight_normed(), torch.randn(2, 4, 16)
    copied: Any = copy_of(network)
    assert torch.equal(copied(x), network(x))
    nn.init.zeros_(copied[0].weight_g)
    assert not copied[0](x).sub(copied[0].bias.view(1, -1, 1)).any()
    assert network[0](x).any()


def test_the_advice_for_an_old_weight_norm_works() -> None:
    network, x = weight_normed(), torch.randn(2, 4, 16)
    advice = r"remove_weight_norm\(module\)"
    with pytest.raises(ValueError, match=advice):
        prepare(network)
    with pytest.raises(PreflightError, match=advice):
        preflight(network, x)
    nn.utils.remove_weight_norm(network[0])
    prepare(network)


def test_the_advice_for_a_weight_that_is_no_parameter_works() -> None:
    network: Any = weight_normed()
    network[0]._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match=r"module.weight = torch.nn.Parameter\(weight\)"):
        prepare(network)
    weight = network[0].weight.detach()
    del network[0].weight
    network[0].weight = nn.Parameter(weight)
    prepare(network)


def test_the_advice_for_an_old_spectral_norm_works() -> None:
    network = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU())
    with pytest.raises(ValueError, match=r"remove_spectral_norm\(module\)"):
        prepare(network)
    nn.utils.remove_spectral_norm(network[0])
    prepare(network)
