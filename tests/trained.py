"""A network that has learned something: fidelity says little about random weights."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qat_lightning import prepare
from qat_lightning.tasks.models import DigitsCNN


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The images of scikit-learn's digits, (1797, 1, 8, 8) from 0 to 1, and their labels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@cache
def float_weights() -> dict[str, Tensor]:
    """The state dict of a DigitsCNN after four epochs of float training."""
    torch.manual_seed(0)
    network = DigitsCNN()
    _train(network, epochs=4, lr=3e-3)
    return network.state_dict()


def trained_digits_network(**options: object) -> nn.Module:
    """A DigitsCNN, prepared and trained for an epoch, observers frozen in a second; in eval mode."""
    torch.manual_seed(0)
    network = DigitsCNN()
    network.load_state_dict(float_weights())
    prepared = prepare(network, **options)  # type: ignore[arg-type]
    _train(prepared, epochs=1, lr=5e-4)
    prepared.apply(torch.ao.quantization.disable_observer)
    _train(prepared, epochs=1, lr=1e-4)
    return prepared.eval()


def _train(network: nn.Module, epochs: int, lr: float) -> None:
    images, labels = digits()
    optimizer = torch.optim.Adam(network.train().parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(64):
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
