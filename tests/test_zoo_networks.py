"""Networks of transformers, ultralytics, timm and torchvision: captured, trained a step, converted, saved."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import convert, load_int8, prepare, save_int8
from qat_lightning.base.nested import tensors_in
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.recipe import recipe_of
from tests.zoo_networks import NETWORKS, ZooNetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of these packages
]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@pytest.fixture(params=NETWORKS)
def zoo(request: pytest.FixtureRequest) -> Iterator[ZooNetwork]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield NETWORKS[request.param]


def floats(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def plain_attributes(network: nn.Module) -> list[tuple[str, str, Any]]:
    """The plain values and tensors that the modules hold."""
    kinds = (bool, int, float, str, type(None), Tensor, torch.Size)
    return [
        (path, name, value)
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    ]


def with_statistics(network: nn.Module, zoo: ZooNetwork) -> nn.Module:
    """Gives the batch-norms the statistics of the examples, without which eval mode means nothing."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.train()
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for call in (zoo.example, zoo.other) if norms else ():
            network(**call)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network


def test_its_layers_become_int8_and_its_outputs_stay(zoo: ZooNetwork, tmp_path: Path) -> None:
    network = with_statistics(zoo.build(), zoo)
    layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    before = plain_attributes(network)
    state = copy.deepcopy(network.state_dict())
    prepared = prepare(network, example_inputs=zoo.example, backend="onednn")
    after = plain_attributes(network)
    assert [each[:2] for each in after] == [each[:2] for each in before]
    assert all(a is b or a == b for (*_, a), (*_, b) in zip(after, before, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    recipe = recipe_of(prepared)
    assert recipe is not None
    assert set(layers) <= set(recipe.layers)

    network.eval()
    set_enabled(prepared, observer=False, fake_quant=False)
    prepared.eval()
    with torch.no_grad():
        for call in (zoo.example, zoo.other):
            expected, found = network(**call), prepared(**call)
            assert type(found) is type(expected)
            for a, b in zip(floats(expected), floats(found), strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=1e-3 * a.abs().max().item())

    set_enabled(prepared, observer=True, fake_quant=True)
    prepared.train()
    sum(each.square().mean() for each in floats(prepared(**zoo.example))).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        prepared(**zoo.other)
        int8 = convert(prepared.eval())
        loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), zoo.build())
        for a, b in zip(floats(int8(**zoo.other)), floats(loaded(**zoo.other)), strict=True):
            assert torch.equal(a, b)
