"""The int8 outputs of random networks equal their fake-quant outputs, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_lightning import convert, prepare
from qat_lightning.fake_quant.phases import set_enabled
from tests.networks import layers_that_differ, leaves, train_steps
from tests.random_graphs import CHANNELS, RandomNetwork, networks

_EXAMPLES = 60


def _inputs() -> tuple[Tensor, Tensor]:
    """Images of an odd size: a mean of 36 integers may lie in the middle between two, a mean of 25 does not.

    Float arithmetic decides to which of the two such a mean is rounded.
    """
    return torch.randn(4, CHANNELS, 5, 5), torch.randn(4, CHANNELS, 5, 5)


def _copies(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Copies, which a network may overwrite."""
    return tuple(x.clone() for x in inputs)


def _trains(network: RandomNetwork, inputs: tuple[Tensor, Tensor]) -> bool:
    """Whether float training works: autograd refuses some operations in place."""
    try:
        torch.stack([leaf.sum() for leaf in leaves(network(*_copies(inputs)))]).sum().backward()
    except RuntimeError:
        return False
    return True


@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(network=networks(), seed=st.integers(0, 3))
def _check(network: RandomNetwork, seed: int) -> None:
    torch.manual_seed(seed)
    for module in network.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    note(str(network.steps))
    inputs = _inputs()
    assume(_trains(network, inputs))
    network.zero_grad()
    expected = leaves(network.eval()(*_copies(inputs)))
    prepared = prepare(network.train(), replace_relu6=False)
    prepared.eval()
    set_enabled(prepared, observer=True, fake_quant=False)
    with torch.no_grad():
        for want, got in zip(expected, leaves(prepared(*_copies(inputs))), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    set_enabled(prepared, observer=True, fake_quant=True)
    train_steps(prepared, (inputs, {}))
    int8 = convert(prepared)
    with torch.no_grad():
        trained, found = leaves(prepared(*_copies(inputs))), leaves(int8(*_copies(inputs)))
    assert layers_that_differ(prepared, int8, *_copies(inputs)) == []
    for want, got in zip(trained, found, strict=True):
        assert torch.equal(want, got)


def test_int8_is_fake_quant() -> None:
    """Each layer computes the same from the same input, and each network the same outputs."""
    _check()
