"""Tensors whose ranges differ do not share qparams: numbers, masks and the ends of networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, MovingAverageMinMaxObserver, QConfig, QuantStub
from torch.nn import functional as F

from qat_lightning import convert, export_onnx, export_openvino, load_int8, load_runtime, prepare, save_int8
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.qconfig import default_qconfig
from tests.networks import Residual, sqnr, train_steps

BACKENDS = ("x86", "onednn")
Function = Callable[[Tensor], Tensor]


def trained(network: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """Prepares a network and lets it see a few batches."""
    prepared = prepare(network, **options).train()
    for _ in range(3):
        prepared(*inputs)
    return prepared.eval()


def floats(prepared: nn.Module, *inputs: Tensor) -> Tensor:
    """What a prepared network gives without rounding."""
    set_enabled(prepared, observer=False, fake_quant=False)
    try:
        with torch.no_grad():
            output: Tensor = prepared(*inputs)
            return output
    finally:
        set_enabled(prepared, observer=False, fake_quant=True)


def fidelity(prepared: nn.Module, *inputs: Tensor) -> float:
    """How near fake-quant is to float in dB, whatever number both have in common."""
    expected = floats(prepared, *inputs)
    return sqnr(expected - expected.mean(), prepared(*inputs) - expected.mean())


def equal_to_int8(prepared: nn.Module, *inputs: Tensor) -> bool:
    """Whether int8 gives the same, but for the order of additions."""
    with torch.no_grad():
        return torch.allclose(convert(prepared)(*inputs), prepared(*inputs), rtol=1e-5, atol=1e-6)


class Around(nn.Module):
    """A function after a convolution, and before another one unless it comes last."""

    def __init__(self, function: Function, last: bool = False) -> None:
        super().__init__()
        self.before, self.function = nn.Conv2d(3, 8, 1), function
        self.after = nn.Identity() if last else nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 3, 8, 8)


WITH_NUMBERS: dict[str, Function] = {
    "x * 100": lambda x: x * 100,
    "0.01 * x": lambda x: 0.01 * x,
    "x.mul(100)": lambda x: x.mul(100),
    "torch.mul": lambda x: torch.mul(x, -30),
    "x + 2": lambda x: x + 2,
    "relu": lambda x: torch.relu(x * 0.01 + 0.01),
    "in place": lambda x: x.mul_(50).add_(3),
    "flattened": lambda x: (x.flatten(2) * 100).reshape(x.shape) + 0.45,
    "a size": lambda x: x * x.shape[1] ** 2,
    "clamp": lambda x: (x + 0.45).clamp(0, 1),
    "two": lambda x: (x * 255 - 128) / 60 + x,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["between", "last"])
@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_a_result_with_a_number_has_qparams_of_its_own(name: str, last: bool, backend: str) -> None:
    x = images()
    prepared = trained(Around(WITH_NUMBERS[name], last), x, backend=backend)
    assert fidelity(prepared, x) > (26 if backend == "x86" else 32)
    assert equal_to_int8(prepared, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_number_added_last_costs_nothing(backend: str) -> None:
    x = images()
    alone, added = (trained(Around(f, True), x, backend=backend) for f in (lambda x: x, lambda x: x + 100))
    added.load_state_dict(alone.state_dict(), strict=False)
    assert torch.equal(added(x), alone(x) + 100)
    assert equal_to_int8(added, x)


def test_the_mean_added_back_clips_nothing() -> None:
    """With onednn the sum shared the qparams of its input, which cannot hold it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    x = torch.rand(4, 3, 12, 12) - 0.45
    prepared = trained(AddedBack(network), x, backend="onednn")
    assert sqnr(floats(prepared, x) - 0.45, prepared(x) - 0.45) > 38
    assert equal_to_int8(prepared, x)


class AddedBack(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 0.45


def test_fake_quantizes_beside_numbers_keep_their_names() -> None:
    x = images()
    prepared = trained(Around(lambda x: x * 100), x)
    names = {name.split(".")[0] for name in prepared.state_dict() if name.startswith("activation")}
    assert names == {f"activation_post_process_{i}" for i in range(4)}


class Attention(nn.Module):
    """Scores with a mask that `masked` applies, as models of language do."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor], softmax: Function) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.masked, self.softmax = masked, softmax

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.masked(torch.matmul(self.q(x), self.k(x).transpose(1, 2)), mask[:, None])
        return self.out(torch.matmul(self.softmax(scores), self.v(x)))


LEAST = torch.finfo(torch.float32).min
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "-10000": lambda a, mask: a + (1.0 - mask) * -10000.0,
    "least": lambda a, mask: a / 4 + (1.0 - mask) * LEAST,
    "masked_fill": lambda a, mask: a.masked_fill(mask == 0, -torch.inf),
    "where": lambda a, mask: torch.where(mask == 0, LEAST, a),
    "-inf": lambda a, mask: a + mask.log(),
    "two sums": lambda a, mask: ((a * 0.25 + 1) + (1 - mask) * -1e4).view(a.shape).float(),
    "clamped": lambda a, mask: torch.max(a + (1 - mask) * LEAST, torch.full((1,), LEAST)),
}
SOFTMAXES: dict[str, Function] = {"module": nn.Softmax(-1), "function": lambda a: F.softmax(a, -1)}


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("name", MASKS)
def test_padding_changes_nothing(name: str, softmax: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16)
    mask = torch.tensor([[1.0] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3, [1] * 6])
    padded = torch.where(mask[..., None] > 0, x, torch.randn_like(x))
    prepared = trained(Attention(MASKS[name], SOFTMAXES[softmax]), x, mask)
    with torch.no_grad():
        for network in (prepared, convert(prepared)):
            moved = (network(x, mask) - network(padded, mask)).abs() * mask[..., None]
            assert float(moved.max()) == 0
    assert fidelity(prepared, x, mask) > 25
    assert equal_to_int8(prepared, x, mask)


class Sdpa(nn.Module):
    """Masks that are added to one another and given to the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        both = (1 - mask[:, None]) * -1e4 + (1 - torch.ones(6, 6).tril()) * -1e4
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=both))


def test_masks_for_attention_are_not_rounded() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 16), torch.tensor([[1.0] * 6] * 2 + [[1] * 4 + [0] * 2] * 2)
    prepared = trained(Sdpa(), x, mask)
    observers: list[Any] = [fake.activation_post_process for _, fake in fake_quantizes(prepared)]
    assert max(float(-observer.min_val.min()) for observer in observers) < 100
    assert equal_to_int8(prepared, x, mask)


class MaskedLogits(nn.Module):
    """Returns logits, of which a mask excludes some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x) + (1 - mask) * -1e9


def test_masked_logits_keep_their_scale() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(16, 6), (torch.rand(16, 8) > 0.5).float()
    prepared = trained(MaskedLogits(), x, mask)
    valid = mask > 0
    assert sqnr(floats(prepared, x, mask)[valid], prepared(x, mask)[valid]) > 28
    assert equal_to_int8(prepared, x, mask)


class Detector(nn.Module):
    """Boxes of hundreds of pixels, and scores below 1."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor], last: bool = True) -> None:
        super().__init__()
        self.box, self.cls, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), join
        self.after = nn.Identity() if last else nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        boxes, scores = torch.relu(self.box(x) + 1) * 320 + 8, self.cls(x).softmax(1)
        return self.after(self.join([boxes, scores]))


ENDS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "transpose": lambda parts: torch.cat(parts, 1).transpose(1, 2),
    "flatten": lambda parts: torch.flatten(torch.cat(parts, dim=1), 2),
    "method": lambda parts: torch.cat(parts, 1).flatten(2).permute(0, 2, 1),
    "stack": lambda parts: torch.stack(parts, 1),
    "twice": lambda parts: torch.cat([torch.cat(parts, 1).reshape(8, 8, 64), torch.ones(8, 8, 1)], 2),
}


@pytest.mark.parametrize("name", ENDS)
def test_boxes_do_not_round_scores_away(name: str) -> None:
    x = images()
    prepared = trained(Detector(ENDS[name]), x)
    expected, rounded = floats(prepared, x), prepared(x)
    scores = (expected > 0) & (expected < 1)
    assert scores.sum() > 1000
    assert sqnr(expected[scores], rounded[scores]) > 30
    assert equal_to_int8(prepared, x)


def test_a_concatenation_that_is_kept_float_lets_its_parts_differ() -> None:
    """Between int8 layers its parts have qparams of their own; its result still has to be rounded."""
    x = images()
    kept = trained(Wide(), x, keep_float=["torch.cat()"])
    small, large = (kept.get_submodule(f"activation_post_process_{i}").scale for i in (1, 2))
    assert large > 50 * small
    assert equal_to_int8(kept, x)


class Wide(nn.Module):
    """Concatenates two layers between int8 layers."""

    def __init__(self, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.small, self.large, self.after = (nn.Conv2d(i, 4, 1) for i in (3, 3, 8))
        self.gate = gate or nn.Identity()
        with torch.no_grad():
            self.large.weight *= 100

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.gate(self.small(x)), self.large(x)], 1))


def test_concatenations_between_int8_layers_stay_int8() -> None:
    x = images()
    prepared = trained(Wide(), x)
    parts = [prepared.get_submodule(f"activation_post_process_{i}") for i in (1, 2)]
    assert parts[0] is parts[1]
    assert torch.cat in {node.target for node in convert(prepared).graph.nodes}
    assert equal_to_int8(prepared, x)


def test_fixed_qparams_are_not_those_of_the_other_parts() -> None:
    """A sigmoid in front decided the range of the convolution beside it: 0 to 1."""
    x = images()
    prepared = trained(Wide(nn.Sigmoid()), x)
    assert fidelity(prepared, x) > 28
    assert equal_to_int8(prepared, x)


class Eager(nn.Module):
    """Adds a number between stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.sum = QuantStub(), DeQuantStub(), FloatFunctional()
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.sum.add_scalar(self.before(self.quant(x)), 0.45)
        return self.dequant(x), self.dequant(self.after(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eager_sums_with_numbers_are_rounded_alike(backend: str, tmp_path: Path) -> None:
    x = images()
    prepared = trained(Eager(), x, mode="eager", backend=backend)
    int8 = convert(prepared)
    reloaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Eager())
    for network in (int8, reloaded):
        assert all(map(torch.equal, network(x), prepared(x)))
    assert all(
        map(torch.equal, load_runtime(export_onnx(prepared, tmp_path / "a.onnx", (x,)))(x), prepared(x))
    )


class Scaled(nn.Module):
    """Learned scalars: their integers are equal, their scales are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.s, self.t = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.one(x * self.s) + self.two(x * self.t)


class LayerScale(nn.Module):
    """A parameter that is only moved before its use."""

    def __init__(self, move: Function) -> None:
        super().__init__()
        self.stem, self.branch, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.gamma, self.move = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1])), move

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.after(x + self.move(self.gamma) * self.branch(x))


class Token(nn.Module):
    """A parameter that shares its qparams with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.token = nn.Parameter(torch.ones(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.token, self.stem(x)], 0))


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    "scalars": Scaled,
    "view": lambda: LayerScale(lambda gamma: gamma.view(1, -1, 1, 1)),
    "unsqueeze": lambda: LayerScale(lambda gamma: gamma.unsqueeze(-1).unsqueeze(-1)),
    "transpose": lambda: LayerScale(lambda gamma: torch.transpose(gamma.view(1, 1, -1, 1), 1, 2)),
    "indexed": lambda: LayerScale(lambda gamma: gamma[:, None, None]),
    "shared": Token,
    "number": lambda: Around(lambda x: x * 100),
    "boxes": lambda: Detector(ENDS["transpose"]),
}


@pytest.mark.parametrize(
    "name", ["scalars", *(pytest.param(n, marks=pytest.mark.slow) for n in EXPORTED if n != "scalars")]
)
def test_exports_hold_the_same_numbers(name: str, tmp_path: Path) -> None:
    x = images()
    prepared = trained(EXPORTED[name](), x)
    with torch.no_grad():
        expected = prepared(x)
    onnx = load_runtime(export_onnx(prepared, tmp_path / "a.onnx", (x,)))
    assert sqnr(expected, onnx(x)) > 50
    openvino = load_runtime(export_openvino(prepared, tmp_path / "a.xml", (x,)))
    assert sqnr(expected, openvino(x)) > 30


def test_a_moved_parameter_is_stored_as_int8(tmp_path: Path) -> None:
    import onnx

    x = images()
    path = export_onnx(trained(EXPORTED["view"](), x), tmp_path / "a.onnx", (x,))
    shapes = {tuple(i.dims): i.data_type for i in onnx.load(path).graph.initializer}
    assert shapes[1, 4, 1, 1] == onnx.TensorProto.UINT8


class UnequalParts(nn.Module):
    """Concatenates a large and a small part inside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.large.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.cat([self.large(x), self.small(x)], 1))
        return y


def test_a_small_part_does_not_shrink_the_range_of_a_concatenation() -> None:
    prepared: Any = prepare(UnequalParts(), backend="onednn").train()
    x = torch.randn(8, 3, 8, 8)
    for _ in range(20):
        prepared(x)
    found: list[Any] = [each for _, each in fake_quantizes(prepared)]
    (shared,) = [each for each in found if each.forward_extremes.calls > 1]
    expected = torch.cat([prepared.large(x), prepared.small(x)], 1)
    torch.testing.assert_close(shared.activation_post_process.max_val, expected.max(), rtol=0.1, atol=0)
    torch.testing.assert_close(shared.activation_post_process.min_val, expected.min(), rtol=0.1, atol=0)
    y = prepared.eval()(x)
    set_enabled(prepared, observer=False, fake_quant=False)
    assert sqnr(prepared(x), y) > 30


def test_a_forward_that_is_broken_off_does_not_go_on_in_the_next_one() -> None:
    fake_quantize = FakeQuantize()
    fake_quantize.forward_extremes.calls = 2
    fake_quantize(torch.tensor([-100.0, 100.0]))
    fake_quantize.eval().train()
    fake_quantize.activation_post_process.reset_min_max_vals()
    for _ in range(3):
        fake_quantize(torch.tensor([-1.0, 1.0]))
        fake_quantize(torch.tensor([0.0, 2.0]))
    observer: Any = fake_quantize.activation_post_process
    assert (observer.min_val, observer.max_val) == (-1, 2)


SIGNED = QConfig(
    activation=FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
    weight=default_qconfig("onednn").weight,
)  # fmt: skip


def test_signed_activations_are_rounded_in_training_in_int8_and_in_files(tmp_path: Path) -> None:
    x = images()
    prepared = prepare(Residual(), backend="onednn", qconfig=SIGNED)
    train_steps(prepared, ((x,), {}))
    found: list[Any] = [child for _, child in fake_quantizes(prepared)]
    assert {int(child.zero_point) for child in found if child.axis is None} == {0}
    assert equal_to_int8(prepared, x)
    path = export_onnx(prepared, tmp_path / "signed.onnx", (x,))
    with torch.no_grad():
        assert sqnr(prepared(x), load_runtime(path)(x)) > 40


class SigmoidOfFloat(nn.Module):
    """A sigmoid whose input is no int8 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(torch.sin(self.first(x)) * 6 - 3))


@pytest.mark.parametrize("qconfig", [None, "torch"])
@pytest.mark.parametrize("backend", [*BACKENDS, "onnxruntime"])
def test_the_input_of_a_sigmoid_has_qparams_of_its_own(backend: str, qconfig: Any) -> None:
    x = images()
    prepared = trained(SigmoidOfFloat(), x, backend=backend, qconfig=qconfig)
    assert fidelity(prepared, x) > 25
    with torch.no_grad():
        # PyTorch's own fake-quantizes round with scales that differ a little from those of int8.
        assert equal_to_int8(prepared, x) or (qconfig and sqnr(prepared(x), convert(prepared)(x)) > 30)
