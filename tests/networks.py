"""Tiny networks, and a registry of cases: a newcomer's network is tested by adding one entry to `CASES`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat
from torch.nn import functional as F

from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.modes.lowering.int8.qparams import dequantized as bytes_as_floats
from qat_lightning.modes.lowering.int8.qparams import quantized as floats_as_bytes

SIZE = 12
CLASSES = 4


class ConvBnRelu(nn.Module):
    """One convolution, batch-norm and ReLU."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class StubbedConvBnRelu(ConvBnRelu):
    """The same with QuantStubs, for eager mode."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(activation)
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


class Residual(nn.Module):
    """ReLU6, a residual addition and a functional dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        )
        self.classes = CLASSES
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = x.mean((2, 3))
        x = F.dropout(x, 0.2, self.training)
        return self.fc(x)


class Stubbed(nn.Module):
    """The same for eager mode: QuantStubs, FloatFunctional, and a `fuse_model` of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.add = FloatFunctional()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.add.add(x, self.relu2(self.bn2(self.conv2(x))))
        x = self.fc(self.dropout(self.pool(x).flatten(1)))
        return self.dequant(x)

    def fuse_model(self, is_qat: bool = False) -> None:
        assert is_qat
        fuse_modules_qat(self, [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]], inplace=True)


class Unlisted(Stubbed):
    """The same without a `fuse_model`: what to fuse has to be found."""

    fuse_model = None  # type: ignore[assignment]


class StubbedLayers(nn.Module):
    """Layers in a row between QuantStubs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.layers(self.quant(x)))


class TwoInputs(nn.Module):
    """An image and a keyword input; an output that holds a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.extra = nn.Linear(5, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, *, extra: Tensor) -> dict[str, Any]:
        features = self.image(x).mean((2, 3))
        both = features + self.extra(extra)
        return {"logits": self.fc(both), "features": (features, both)}


class Embedded(nn.Module):
    """An embedding before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embedding(x).mean(1))


class ZeroInitResidual(nn.Module):
    """The last batch-norm of the branch starts with weight 0, as ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        nn.init.zeros_(self.branch[1].get_parameter("weight"))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.relu(x + self.branch(x)).mean((2, 3)))


class Nested(nn.Module):
    """Tuples, lists and dicts in and out, a layer called twice, a ModuleList and a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBnRelu()
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.heads = nn.ModuleDict({"main": nn.Linear(8, CLASSES), "side": nn.Linear(8, CLASSES)})

    def forward(self, pair: Any, options: dict[str, Any]) -> Any:
        x = self.stem(pair[0] + pair[1][0])
        x = self.twice(self.twice(x))
        for block in self.blocks:
            x = block(x).relu() + x
        y = x.mean((2, 3)) * options["scale"]
        logits = {name: head(y) for name, head in self.heads.items()}
        return {"logits": logits, "list": [y, (x,)]}


class Encoder(nn.Module):
    """torch.nn's transformer layers, after a projection and before a head."""

    def __init__(self, norm_first: bool = False, activation: str = "relu") -> None:
        super().__init__()
        self.projection = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        layer.activation = getattr(F, activation)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.projection(x)
        return self.head(self.decoder(x, self.encoder(x, mask=mask)).mean(1))


class Recurrent(nn.Module):
    """An LSTM or a GRU between linear layers."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 8)
        self.recurrent = kind(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(F.relu(self.projection(x)))
        return self.head(y[:, -1])


class UNet(nn.Module):
    """Down, up by a transposed convolution with batch-norm, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = ConvBnRelu()
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(x)
        return self.out(torch.cat([self.up(self.down2(x)), x], 1))


@dataclass(frozen=True)
class Case:
    """A network to test in a mode.

    Attributes:
        name: Its name in pytest's output.
        build: Makes the float network.
        mode: `"eager"` or `"fx"`.
        inputs: Makes a batch of inputs, positional and by keyword.
        min_sqnr: How near int8 outputs must be to the fake-quant outputs, in dB.
    """

    name: str
    build: Callable[[], nn.Module]
    mode: str
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    min_sqnr: float = 30.0

    def __str__(self) -> str:
        return self.name


def images(count: int = 16, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size)


def _image() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (images(),), {}


def _nested() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((images(), [images()]), {"scale": torch.rand(1)}), {}


def _sequence() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(16, 5, 6),), {"mask": nn.Transformer.generate_square_subsequent_mask(5)}


CASES = [
    Case("conv_bn_relu", ConvBnRelu, "fx", _image),
    Case("conv_bn_relu6", lambda: ConvBnRelu(nn.ReLU6), "fx", _image),
    Case("residual", Residual, "fx", _image),
    Case("stubbed", Stubbed, "eager", _image),
    Case("unlisted", Unlisted, "eager", _image),
    Case(
        "conv1d",
        lambda: StubbedLayers(
            *(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)),
            *(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
        ),
        "eager",
        lambda: ((torch.randn(16, 3, SIZE),), {}),
    ),
    Case(
        "conv3d",
        lambda: StubbedLayers(
            *(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU6(), nn.Conv3d(8, 8, 3), nn.ReLU()),
            *(nn.BatchNorm3d(8), nn.ReLU(), nn.AvgPool3d(4), nn.Flatten(), nn.Linear(8, CLASSES)),
        ),
        "eager",
        lambda: ((torch.randn(16, 3, 8, 8, 8),), {}),
    ),
    Case(
        "linear_bn",
        lambda: StubbedLayers(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
            *(nn.BatchNorm1d(8), nn.Linear(8, CLASSES)),
        ),
        "eager",
        lambda: ((torch.randn(64, 6),), {}),
    ),
    Case("two_inputs", TwoInputs, "fx", lambda: ((images(),), {"extra": torch.randn(16, 5)})),
    Case("embedded", Embedded, "fx", lambda: ((torch.randint(10, (16, 6)),), {})),
    Case("zero_init_residual", ZeroInitResidual, "fx", _image),
    Case("nested", Nested, "fx", _nested, min_sqnr=25),  # what it returns has 7 bits on x86
    Case("encoder", Encoder, "fx", _sequence),
    Case("encoder_norm_first", lambda: Encoder(True, "gelu"), "fx", _sequence),
    Case("lstm", lambda: Recurrent(nn.LSTM), "fx", lambda: ((torch.randn(16, 5, 6),), {})),
    Case("gru", lambda: Recurrent(nn.GRU), "fx", lambda: ((torch.randn(16, 5, 6),), {})),
    Case("u_net", UNet, "fx", _image),
]


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in leaves(item)]


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: how near `other` is to `reference`."""
    reference, other = reference.detach(), other.detach()
    noise = (reference - other).pow(2).mean()
    return float(10 * torch.log10(reference.pow(2).mean() / noise.clamp_min(1e-20)))


def layers_that_differ(prepared: nn.Module, int8: nn.Module, *inputs: Tensor) -> list[str]:
    """The int8 layers whose output is not what the fake-quantized layer makes of the same input.

    On PyTorch's quantized tensors one element in a thousand may be: a sum that lies next to the middle
    between two points, and is rounded to the other one. In a deep network that has hardly been trained a
    single such element moves many others, and how many depends on the CPU, so that the network's output says
    little of its layers. On plain tensors none may be.
    """
    found: list[str] = []
    compared: list[str] = []

    def compare(name: str, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        # A layer that is called twice is two layers in int8.
        layer = prepared.get_submodule(re.sub(r"(_call_\d+|_)$", "", name))
        compared.append(name)
        module: Any = int8.get_submodule(name)
        if isinstance(module, Int8Layer):
            expected = layer(bytes_as_floats(arguments[0], module.qparams("input")))
            qparams = module.output_qparams()
            other = expected if qparams is None else floats_as_bytes(expected, qparams)
            differs = not torch.equal(other, output)
        else:
            expected = layer(arguments[0].dequantize())
            grid = output.q_scale(), output.q_zero_point(), output.dtype
            other = torch.quantize_per_tensor(expected, *grid).int_repr()
            differs = bool((other != output.int_repr()).sum() > 1 + output.numel() // 1000)
        if differs:
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, y, name=name: compare(name, args, y))
        for name, module in int8.named_modules()
        if isinstance(module, quantized.modules.conv._ConvNd | quantized.Linear | Int8Layer)
    ]
    with torch.no_grad():
        int8(*inputs)
    for handle in handles:
        handle.remove()
    assert len(compared) == len(handles)
    return found


def train_steps(network: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], steps: int = 4) -> None:
    """Trains a few steps towards nothing in particular, then switches to eval mode."""
    args, kwargs = inputs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        errors = [(leaf - 1).pow(2).mean() for leaf in leaves(network(*args, **kwargs))]
        torch.stack(errors).sum().backward()
        optimizer.step()
    network.eval()


def same_state(left: nn.Module | dict[str, Any], right: nn.Module | dict[str, Any]) -> list[str]:
    """Names of the entries that are not equal bit for bit."""
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (left, right))
    assert a.keys() == b.keys()
    return [name for name in a if not _equal(a[name], b[name])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
