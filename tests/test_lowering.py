"""Int8 networks on plain tensors: they compute what fake-quantization simulates, on both kinds of kernels."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from qat_lightning import GuardError, convert, prepare
from qat_lightning.base.torch_internals import DispatchMode
from qat_lightning.fake_quant.numerics import Kernel, fake_quantize
from qat_lightning.modes import lowering
from qat_lightning.modes.lowering.int8 import memory, onednn, tables
from qat_lightning.modes.lowering.int8.arithmetic import Product, Sum
from qat_lightning.modes.lowering.int8.edges import Dequantize, Quantize
from qat_lightning.modes.lowering.int8.layers import Geometry, Int8Layer, Weight
from qat_lightning.modes.lowering.int8.pools import MaxPool
from qat_lightning.modes.lowering.int8.qparams import QParams, dequantized, quantized
from qat_lightning.modes.lowering.int8.tables import Table
from qat_lightning.modes.lowering.int8.weights import StoredWeight
from tests.networks import Residual


class Call(nn.Module):
    """Layers, and a function that calls them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, **self.layers)


def conv(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 8, 8))


def after(layer: nn.Module, function: Callable[[Tensor], Any], last: nn.Module | None = None) -> nn.Module:
    """A function between two layers, so that its input and its result are rounded."""
    layers = {"first": layer, "last": last or conv(8, 3, 1)}
    if isinstance(function, nn.Module):
        return nn.Sequential(layers["first"], function, layers["last"])
    return Call(lambda x, first, last: last(function(first(x))), **layers)


def attention(x: Tensor, qkv: nn.Module, proj: nn.Module) -> Any:
    q, k, v = qkv(x).chunk(3, -1)
    weights = torch.softmax(q @ k.transpose(-2, -1), -1)
    return proj(weights @ v)


class Branches(nn.Module):
    """Calls a float module of a block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(6), "fc": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["norm"](self.block["fc"](x))
        z: Tensor = self.head(self.block["norm"](y + x))
        return z


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 3, 1)), (2, 4, 9)),
    "conv2d": (lambda: nn.Sequential(conv(4, 8, 3, padding=1, bias=False), conv(8, 3, 1)), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 3, 1)), (2, 2, 5, 6, 7)),
    "groups": (lambda: nn.Sequential(conv(4, 8, 3, groups=2), conv(8, 8, 3, groups=8)), (2, 4, 8, 8)),
    "stride": (lambda: conv(4, 8, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "dilation": (lambda: conv(4, 8, 3, dilation=2, padding=2), (2, 4, 9, 8)),
    "same": (lambda: conv(4, 8, 3, padding="same"), (2, 4, 9, 8)),
    "uneven": (lambda: nn.Sequential(conv(4, 8, 2, padding="same"), conv(8, 3, 1)), (2, 4, 9, 8)),
    "unbatched": (lambda: nn.Sequential(conv(4, 8, 3), nn.ReLU(), conv(8, 3, 1)), (4, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 6)),
    "linear of 3": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (2, 5, 6)),
    "linear of 1": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (6,)),
    "transposed": (lambda: after(nn.Linear(6, 8), lambda x: x.transpose(1, 2), nn.Linear(5, 3)), (2, 5, 6)),
    "batch-norm": (
        lambda: nn.Sequential(conv(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        (4, 4, 8, 8),
    ),
    "residual": (
        lambda: Call(lambda x, a, b: b(F.relu(a(x) + x)), a=conv(4, 4, 3, padding=1), b=conv(4, 3, 1)),
        (2, 4, 8, 8),
    ),
    "sum": (
        lambda: Call(lambda x, a, b, c: c(a(x) + b(x)), a=conv(4, 8, 1), b=conv(4, 8, 1), c=conv(8, 3, 1)),
        (2, 4, 8, 8),
    ),
    "broadcast sum": (
        lambda: Call(
            lambda x, a, b: b(a(x) + a(x).mean((2, 3), keepdim=True)), a=conv(4, 8, 1), b=conv(8, 3, 1)
        ),
        (2, 4, 8, 8),
    ),
    "gate": (
        lambda: Call(
            lambda x, a, b, c: c(a(x) * torch.sigmoid(b(F.adaptive_avg_pool2d(a(x), 1)))),
            a=conv(4, 8, 1),
            b=conv(8, 8, 1),
            c=conv(8, 3, 1),
        ),
        (2, 4, 7, 7),
    ),
    "cat": (
        lambda: Call(
            lambda x, a, b, c: c(torch.cat([a(x), b(x)], 1)),
            a=conv(4, 4, 1),
            b=conv(4, 4, 1),
            c=conv(8, 3, 1),
        ),
        (2, 4, 8, 8),
    ),
    "chunk": (lambda: after(conv(4, 8, 1), lambda x: x.chunk(2, 1)[1], conv(4, 3, 1)), (2, 4, 8, 8)),
    "chunks": (lambda: Call(lambda x, a: torch.stack(a(x).chunk(2, 1)), a=conv(4, 8, 1)), (2, 4, 8, 8)),
    "shuffle": (lambda: after(conv(4, 8, 1), nn.PixelShuffle(2), conv(2, 3, 1)), (2, 4, 8, 8)),
    "pad": (lambda: after(conv(4, 8, 1), lambda x: F.pad(x, (1, 2, 0, 1))), (2, 4, 8, 8)),
    "view": (
        lambda: after(conv(4, 8, 3), lambda x: x.view(x.shape[0], -1), nn.Linear(8 * 36, 3)),
        (2, 4, 8, 8),
    ),
    "max-pool": (lambda: after(conv(4, 8, 1), nn.MaxPool2d(3, 2, 1)), (2, 4, 9, 8)),
    "average pool": (lambda: after(conv(4, 8, 1), nn.AvgPool2d(3, 2, 1)), (2, 4, 9, 8)),
    "global pool": (
        lambda: after(conv(4, 8, 1), lambda x: flat(F.adaptive_avg_pool2d(x, 1)), nn.Linear(8, 3)),
        (2, 4, 7, 7),
    ),
    "mean": (lambda: after(conv(4, 8, 1), lambda x: x.mean((2, 3)), nn.Linear(8, 3)), (2, 4, 7, 7)),
    "nearest": (lambda: after(conv(4, 8, 1), lambda x: F.interpolate(x, scale_factor=2)), (2, 4, 5, 5)),
    "normed": (lambda: after(conv(4, 8, 1), nn.BatchNorm2d(8)), (4, 4, 8, 8)),
    "normed and bent": (
        lambda: after(conv(4, 8, 1), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Tanh())),
        (4, 4, 8, 8),
    ),
    "rectified in 3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, 1), nn.ReLU()),
        (2, 2, 5, 6, 7),
    ),
    "reflect": (lambda: conv(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "computed weight": (
        lambda: Call(
            lambda x, a, b: F.conv2d(a(x), b.weight - b.weight.mean(), b.bias),
            a=conv(4, 8, 1),
            b=conv(8, 3, 1),
        ),
        (2, 4, 5, 5),
    ),
    "circular": (lambda: conv(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 8, 8)),
    "transposed convolution": (
        lambda: after(conv(4, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)),
        (2, 4, 5, 5),
    ),
    "a norm twice": (lambda: Branches(), (2, 5, 6)),
    "layer-norm": (lambda: after(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (2, 5, 6)),
    "attention": (lambda: Call(attention, qkv=nn.Linear(6, 24), proj=nn.Linear(8, 3)), (2, 5, 6)),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hard-swish": nn.Hardswish(),
    "hard-sigmoid": nn.Hardsigmoid(),
    "leaky": nn.LeakyReLU(0.1),
    "elu": nn.ELU(),
    "tanh": torch.tanh,
    "relu6": lambda x: x.clamp(0, 0.5),
    "chain": lambda x: F.relu(x * 2) - 0.3,
}


def prepared(build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int = 0) -> Any:
    """Returns a calibrated network in eval mode."""
    torch.manual_seed(seed)
    network: nn.Module = prepare(build(), backend="onednn", example_inputs=(torch.randn(shape),)).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(shape))
    return network.eval()


def kinds(network: nn.Module) -> Counter[type[nn.Module]]:
    return Counter(type(module) for module in network.modules())


@pytest.fixture(params=["oneDNN", "exact"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "exact":
        monkeypatch.setattr(onednn, "is_exact", lambda: False)
        monkeypatch.setattr(onednn, "has_operators", lambda: False)
    elif not onednn.is_exact():
        pytest.skip("oneDNN overflows on this CPU, or is not there")
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("case", [*CASES, *ACTIVATIONS])
def test_it_computes_what_fake_quantization_simulates(case: str, kernels: str) -> None:
    if case in CASES:
        build, shape = CASES[case]
    else:
        build, shape = lambda: after(conv(4, 8, 1), ACTIVATIONS[case]), (2, 4, 8, 8)
    network = prepared(build, shape)
    int8 = convert(network)
    for x in (torch.randn(shape), 3 * torch.randn(shape)):
        assert torch.equal(int8(x), network(x))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["x86", "onednn", "openvino"])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_an_untrained_deep_network_is_equal_too(name: str, backend: str) -> None:
    """There a single value that is rounded to the other side moves most of the outputs."""
    torch.manual_seed(0)
    network = prepare(getattr(models, name)(num_classes=10), backend=backend).train()
    network(torch.randn(8, 3, 64, 64))
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(convert(network.eval())(x), network(x))


FLOAT = ("a norm twice", "layer-norm", "attention")
"""Cases that compute a part with floats."""


@pytest.mark.parametrize("case", [case for case in [*CASES, *ACTIVATIONS] if case not in FLOAT])
def test_integers_flow_from_the_first_layer_to_the_last(case: str) -> None:
    build, shape = CASES.get(case) or (lambda: after(conv(4, 8, 1), ACTIVATIONS[case]), (2, 4, 8, 8))
    found = kinds(convert(prepared(build, shape)))
    assert found[Quantize] == found[Dequantize] == 1


@pytest.mark.parametrize(
    ("case", "kind", "count"),
    [
        *[("residual", Sum, 1), ("broadcast sum", Sum, 1), ("gate", Product, 1), ("gate", Table, 1)],
        *[("silu", Table, 1), ("chain", Table, 1), ("max-pool", MaxPool, 1), ("attention", Int8Layer, 2)],
    ],
)
def test_which_operations_a_network_has(case: str, kind: type[nn.Module], count: int) -> None:
    build, shape = CASES.get(case) or (lambda: after(conv(4, 8, 1), ACTIVATIONS[case]), (2, 4, 8, 8))
    assert kinds(convert(prepared(build, shape)))[kind] == count


class Operators(DispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("case", ["residual", "gate", "attention", "max-pool", "cat"])
def test_no_quantized_tensor_is_made(case: str, kernels: str) -> None:
    int8 = convert(prepared(*CASES[case]))
    with Operators() as operators:
        int8(torch.randn(CASES[case][1]))
    assert not [name for name in operators.names if "quantize" in name or "onednn.qadd" in name]
    assert any(name.startswith("onednn.") for name in operators.names) is (kernels == "oneDNN")


def test_it_knows_nothing_of_torch_ao() -> None:
    paths = [*Path(lowering.__file__).parent.rglob("*.py")]
    assert len(paths) > 15
    for path in paths:
        text = path.read_text()
        assert not [
            word for word in ("import torch.ao", "from torch.ao", "torch.ops.quantized.") if word in text
        ]


@torch.no_grad()
def test_threads_share_a_network() -> None:
    build, shape = CASES["residual"]
    int8 = convert(prepared(build, shape))
    inputs = [torch.randn(shape) for _ in range(4)]
    expected = [copy.deepcopy(int8)(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:  # the first calls pack the weights at the same time
        for _ in range(5):
            for found, wanted in zip(pool.map(int8, inputs), expected, strict=True):
                assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("case", ["residual", "gate", "attention", "circular", "conv3d"])
def test_a_network_that_has_run_can_be_copied(case: str) -> None:
    build, shape = CASES[case]
    int8, x = convert(prepared(build, shape)), torch.randn(shape)
    expected = int8(x)
    assert torch.equal(copy.deepcopy(int8)(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", ["residual", "circular", "conv3d", "normed and bent"])
def test_a_network_that_has_run_can_be_pickled(case: str) -> None:
    build, shape = (Residual, (2, 3, 8, 8)) if case == "residual" else CASES[case]
    int8, x = convert(prepared(build, shape)), torch.randn(shape)
    expected = int8(x)
    stream = io.BytesIO()
    torch.save(int8, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(loaded(x), expected)
    with pytest.raises(GuardError):  # guards are in the pickle, too
        loaded(x[0])


@torch.no_grad()
def test_its_state_dict_is_plain_and_complete() -> None:
    build, shape = CASES["gate"]
    first, second = (convert(prepared(build, shape, seed)) for seed in (0, 1))
    x = torch.randn(shape)
    expected = second(x)
    assert not torch.equal(first(x), expected)
    state = second.state_dict()
    assert {value.layout for value in state.values()} == {torch.strided}
    assert {value.dtype for value in state.values()} <= {
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.float32,
    }
    first.load_state_dict(state)
    assert torch.equal(first(x), expected)


@torch.no_grad()
def test_other_batches_and_image_sizes() -> None:
    network = prepared(*CASES["residual"])
    int8 = convert(network)
    for shape in ((1, 4, 8, 8), (5, 4, 8, 8), (3, 4, 13, 6)):
        x = torch.randn(shape)
        assert (int8(x) == network(x)).float().mean() > 0.97


@pytest.mark.parametrize("zero_point", [0, 1, 127, 128, 255])
def test_bytes_are_rounded_as_in_training(zero_point: int) -> None:
    qparams = QParams(0.37, zero_point)
    halves = (torch.arange(-600, 600) + 0.5) * 0.37
    x = torch.cat([torch.randn(1000) * 60, halves, torch.tensor([0.0, 1e9, -1e9, torch.inf, -torch.inf])])
    scale, zero = torch.tensor([0.37]), torch.tensor([zero_point])
    expected = fake_quantize(x, scale, zero, 0, 255, kernel=Kernel())
    assert torch.equal(dequantized(quantized(x, qparams), qparams), expected)


def test_bytes_stay_within_narrower_bounds() -> None:
    found = quantized(torch.randn(1000) * 100, QParams(0.5, 60, 10, 90))
    assert (int(found.min()), int(found.max())) == (10, 90)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_sums_of_all_pairs_of_bytes(kernels: str, relu: bool, large: bool) -> None:
    """oneDNN's own additions are wrong from 128 on."""
    first, second, output = QParams(0.0312, 120), QParams(0.0277, 9), QParams(0.0413, 101)
    every = torch.arange(256, dtype=torch.uint8)
    a, b = every.repeat_interleave(256), every.repeat(256)
    repeats = 2 if large else 1
    a, b = (each.repeat(repeats).view(1, -1, 64, 16).permute(0, 3, 1, 2) for each in (a, b))
    y = dequantized(a, first) + dequantized(b, second)
    expected = quantized(y.relu() if relu else y, output)
    found = Sum(first, second, output, relu)(a, b)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-3


def test_products_of_all_pairs_of_bytes() -> None:
    first, second, output = QParams(0.0312, 120), QParams(0.0277, 9), QParams(0.1013, 101)
    every = torch.arange(256, dtype=torch.uint8)
    a, b = every.repeat_interleave(256), every.repeat(256)
    expected = quantized(dequantized(a, first) * dequantized(b, second), output)
    found = Product(first, second, output)(a, b)
    assert (found != expected).float().mean() < 1e-3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [100, 101, 4000])
def test_tables_look_up_single_bytes_and_pairs(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_IN_PAIRS", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    table = Table(torch.tanh, QParams(0.02, 120), QParams(0.01, 100))
    x = torch.randint(0, 256, (1, 2, size, 1), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    wanted: Any = table.table
    assert torch.equal(table(x), wanted[x.long()])


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)]
)
def test_max_pooling_of_bytes(size: int, stride: int, padding: int, dilation: int) -> None:
    x = torch.randint(0, 256, (3, 4, 11, 9), dtype=torch.uint8)
    expected = F.max_pool2d(x.float(), size, stride, padding, dilation)
    found = MaxPool([size] * 2, [stride] * 2, [padding] * 2, [dilation] * 2)(x)
    assert torch.equal(found.float(), expected)


def test_large_tensors_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK", 50)
    a, b = (torch.randint(0, 256, (3, 4, 11, 9), dtype=torch.uint8) for _ in range(2))
    qparams = QParams(0.0312, 120)
    x = dequantized(a, qparams)
    assert torch.equal(Quantize(qparams)(x), a)
    module = Product(qparams, QParams(0.0277, 9), QParams(0.1013, 101))
    expected = module(a, b)
    monkeypatch.setattr(memory, "BLOCK", 1 << 20)
    assert torch.equal(module(a, b), expected)


def test_sums_that_float32_cannot_hold_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_exact", lambda: False)
    weight = Weight(torch.full((1, 1023), 127, dtype=torch.int8), torch.ones(1), None)
    layer = Int8Layer(weight, None, False, QParams(1.0, 0), None)
    x = torch.full((1, 1023), 255, dtype=torch.uint8)
    x[0, 0] = 254
    assert layer(x).double().item() == float(torch.tensor(127.0 * (255 * 1023 - 1)))
    assert Int8Layer(
        Weight(weight.integers[:, :9], weight.scale, None), None, True, QParams(1.0, 9), QParams(2000.0, 0)
    )(x[:, :9]).tolist() == [[round(127 * (246 * 9 - 1) / 2000)]]


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0], [1, 1]])
@pytest.mark.parametrize("zero_point", [0, 77, 255])
def test_both_kernels_agree(zero_point: int, padding: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn.is_exact():
        pytest.skip("oneDNN overflows on this CPU, or is not there")
    torch.manual_seed(0)
    integers = torch.randint(-127, 128, (16, 24, 3, 3), dtype=torch.int8)
    weight = Weight(integers, torch.rand(16) * 0.01 + 0.001, torch.randn(16))
    geometry = Geometry([1, 1], padding, [1, 1], 1)
    arguments = (weight, geometry, True, QParams(0.0312, zero_point), QParams(3.137, 5))
    x = torch.randint(0, 256, (2, 24, 9, 9), dtype=torch.uint8)
    found = Int8Layer(*arguments)(x)
    monkeypatch.setattr(onednn, "is_exact", lambda: False)
    expected = Int8Layer(*arguments)(x)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-3


def test_a_weight_that_is_a_parameter_is_stored_as_integers() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 5, 8))
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x) + self.positions)

    network = prepared(Positions, (2, 5, 6))
    int8 = convert(network)
    x = torch.randn(2, 5, 6)
    assert kinds(int8)[StoredWeight] == 1
    assert not [*int8.parameters()]
    with torch.no_grad():
        assert (int8(x) == network(x)).float().mean() > 0.97


@torch.no_grad()
def test_a_network_may_return_parts_of_bytes() -> None:
    network = prepared(lambda: Call(lambda x, a: a(x).chunk(2, 1), a=conv(4, 8, 1)), (2, 4, 8, 8))
    x = torch.randn(2, 4, 8, 8)
    for found, expected in zip(convert(network)(x), network(x), strict=True):
        assert (found == expected).float().mean() > 0.97
