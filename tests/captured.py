"""Networks whose forward only an example can follow, each with two calls that take the same path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Output:
    """A dataclass, as transformers' ModelOutput is one."""

    logits: Tensor
    features: Tensor | None = None


class Pair(NamedTuple):
    """A NamedTuple."""

    first: Tensor
    second: Tensor


class BySize(nn.Module):
    """Decides by a size, loops over the channels, and makes tensors of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape[2] > 4:
            y = y + torch.arange(x.shape[3], device=x.device).float() / x.shape[3]
        batch, channels, height, width = y.shape
        y = y.reshape(batch, channels, height * width).mean(2)
        return self.fc(sum(y * (i + 1) for i in range(x.shape[1])))  # type: ignore[arg-type]


class WithOptions(nn.Module):
    """Has optional and keyword-only arguments, and takes a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(
        self, inputs: dict[str, Tensor], *, mask: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, Any]:
        y = F.relu(self.a(inputs["x"])) * scale
        if mask is not None:
            y = y * mask[:, None]
        return {"logits": self.b(y), "batch": y.shape[0]}


class Attention(nn.Module):
    """Attention over tokens: embeds ids, makes a mask of integers, returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("positions", torch.arange(16)[None])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        length = input_ids.size(1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions: Any = self.positions
        x = self.embedding(input_ids) + self.position(positions[:, :length])
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(attention_mask[:, None] == 0, torch.finfo(scores.dtype).min)
        x = torch.relu(scores.softmax(-1) @ self.value(x))
        return Output(self.head(x[:, 0]))


class Caching(nn.Module):
    """Keeps the anchors of the last image size, as YOLO does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.shape: Any = None
        self.anchors: Any = torch.empty(0)

    def forward(self, x: Tensor) -> Pair:
        y = self.conv(x)
        if not self.training:
            if self.shape != y.shape:
                self.anchors = torch.arange(y.shape[3], device=y.device) + 0.5
                self.shape = y.shape
            return Pair(y, y * self.anchors)
        return Pair(y, y)


class MadeInside(nn.Module):
    """Makes a module without parameters in its forward, and assigns to items of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = nn.Upsample(scale_factor=2)(self.a(x)).clone()
        y[:, 0] = 0
        y[..., 1:] += 1
        parts = y.chunk(2, 1)
        return self.b(y), [part.mean((2, 3)) for part in parts]


class Case(NamedTuple):
    """A network, an example of its call, and a call of other sizes that takes the same path."""

    build: Any
    example: Any
    other: Any


def _ids(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 20


torch.manual_seed(0)
CASES = {
    "size": Case(BySize, torch.randn(2, 3, 8, 8), torch.randn(3, 3, 6, 10)),
    "options": Case(
        WithOptions,
        {"inputs": {"x": torch.randn(2, 8)}, "mask": torch.ones(2), "scale": 2.0},
        {"inputs": {"x": torch.randn(5, 8)}, "mask": torch.ones(5), "scale": 2.0},
    ),
    "attention": Case(
        Attention,
        {"input_ids": _ids(2, 12), "attention_mask": (_ids(2, 12) % 5 > 0).long()},
        {"input_ids": _ids(3, 9), "attention_mask": (_ids(3, 9) % 4 > 0).long()},
    ),
    "without mask": Case(Attention, _ids(2, 12), _ids(3, 9)),
    "caching": Case(Caching, torch.randn(2, 3, 8, 8), torch.randn(3, 3, 4, 6)),
    "made inside": Case(MadeInside, torch.randn(2, 3, 8, 8), torch.randn(1, 3, 4, 6)),
}
