"""Random small networks: layers, functions, joins and gates in random wiring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda c: nn.Conv2d(c, CHANNELS, 3, padding=1),
    "conv_without_bias": lambda c: nn.Conv2d(c, CHANNELS, 1, bias=False),
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "conv_bn": lambda c: nn.Sequential(nn.Conv2d(c, CHANNELS, 3, padding=1, bias=False), _norm(CHANNELS)),
    "conv_bn_relu": lambda c: nn.Sequential(
        nn.Conv2d(c, CHANNELS, 1, bias=False), _norm(CHANNELS), nn.ReLU(inplace=True)
    ),
    "conv_transposed": lambda c: nn.ConvTranspose2d(c, CHANNELS, 3, padding=1),
    "depthwise_transposed": lambda c: nn.ConvTranspose2d(c, c, 3, padding=1, groups=c),
    "batch_norm": lambda c: _norm(c),
    "relu": lambda c: nn.ReLU(),
    "relu_inplace": lambda c: nn.ReLU(inplace=True),
    "relu6": lambda c: nn.ReLU6(),
    "hardswish": lambda c: nn.Hardswish(),
    "sigmoid": lambda c: nn.Sigmoid(),
    "silu": lambda c: nn.SiLU(),
    "leaky_relu": lambda c: nn.LeakyReLU(0.1),
    "max_pool": lambda c: nn.MaxPool2d(3, 1, padding=1),
    "avg_pool": lambda c: nn.AvgPool2d(3, 1, padding=1),
    "dropout": lambda c: nn.Dropout(0.2),
    "identity": lambda c: nn.Identity(),
    "squeeze": lambda c: _Gate(c),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": lambda x: F.relu(x),
    "F.relu6": lambda x: F.relu6(x),
    "F.hardswish": lambda x: F.hardswish(x),
    "torch.sigmoid": lambda x: torch.sigmoid(x),
    "x.relu": lambda x: x.relu(),
    "x + 1": lambda x: x + 1,
    "x * 2": lambda x: x * 2,
    "-x": lambda x: -x,
    "F.max_pool2d": lambda x: F.max_pool2d(x, 3, 1, 1),
    "F.adaptive_avg_pool2d": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "x.mean": lambda x: x * x.mean((2, 3), keepdim=True),
    "chunk": lambda x: _swap_halves(x),
    "reshape": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a + b": lambda a, b: a + b,
    "a + b, relu": lambda a, b: torch.relu(a + b),
    "a * b": lambda a, b: a * b,
    "a * sigmoid(b)": lambda a, b: a * b.sigmoid(),
    "cat": lambda a, b: torch.cat([a, b], 1),
}


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=0.7)  # a few steps are no average


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


class _Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(self.pool(x)))


@dataclass(frozen=True)
class Step:
    """One operation on earlier values.

    Attributes:
        kind: A key of `LAYERS`, `FUNCTIONS` or `JOINS`.
        source: Which earlier value it reads, counted from the latest.
        other: Which one a join reads beside it.
        share: Whether a layer of the kind that fits and exists already is called again.
    """

    kind: str
    source: int
    other: int
    share: bool


class RandomNetwork(nn.Module):
    """Runs steps on two inputs; outputs are a linear layer of the last value, and further values as asked."""

    def __init__(self, steps: list[Step], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.layers = nn.ModuleList()
        self.layer_of: list[int | None] = []
        made: dict[tuple[str, int], int] = {}
        channels = [CHANNELS, CHANNELS]
        for step in steps:
            width = channels[self._index(step.source, len(channels))]
            index = None
            if step.kind in LAYERS:
                key = (step.kind, width)
                if not (step.share and key in made):
                    made[key] = len(self.layers)
                    self.layers.append(LAYERS[step.kind](width))
                index = made[key]
            self.layer_of.append(index)
            channels.append(self._width(step, width, channels))
        self.head = nn.Linear(channels[-1], 3)

    @staticmethod
    def _index(back: int, count: int) -> int:
        return count - 1 - back % count

    def _width(self, step: Step, width: int, channels: list[int]) -> int:
        if step.kind.startswith("conv"):
            return CHANNELS
        other = channels[self._index(step.other, len(channels))]
        return width + other if step.kind == "cat" else width

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values, widths = [x, y], [CHANNELS, CHANNELS]
        for step, layer in zip(self.steps, self.layer_of, strict=True):
            i, j = self._index(step.source, len(values)), self._index(step.other, len(values))
            value = values[i]
            if layer is not None:
                value = self.layers[layer](value)
            elif step.kind in FUNCTIONS:
                value = FUNCTIONS[step.kind](value)
            elif widths[i] == widths[j] or step.kind == "cat":
                value = JOINS[step.kind](value, values[j])
            widths.append(self._width(step, widths[i], widths))
            values.append(value)
        pooled = F.adaptive_avg_pool2d(values[-1], 1).flatten(1)
        return self.head(pooled), *(values[self._index(back, len(values))] for back in self.outputs)


def networks(longest: int = 10) -> st.SearchStrategy[RandomNetwork]:
    """Random networks of at most so many steps."""
    back = st.integers(0, 3)
    kinds = st.sampled_from([*LAYERS, *FUNCTIONS, *JOINS])
    steps = st.lists(st.builds(Step, kinds, back, back, st.booleans()), min_size=2, max_size=longest)
    return st.builds(RandomNetwork, steps, st.sampled_from([(), (), (0,), (1, 3)]))
