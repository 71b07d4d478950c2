"""Models as people write them: transformers, upsampling, several networks, several optimizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F

from qat_lightning import QuantizationAwareTraining, UntraceableError, convert, load_int8, prepare
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.recipe import quantized_networks, recipe_of
from tests.networks import CLASSES, ConvBnRelu, Encoder, Nested, Residual, UNet, images, sqnr, train_steps
from tests.runs import TinyModule, trainer


def layers(network: nn.Module) -> tuple[str, ...]:
    recipe = recipe_of(network)
    assert recipe is not None
    return recipe.layers


def settle(prepared: nn.Module) -> None:
    set_enabled(prepared, observer=False, fake_quant=True)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layers_of_a_transformer_are_int8(norm_first: bool) -> None:
    network = Encoder(norm_first)
    kind, names = type(network.decoder), network.state_dict().keys()
    plain = copy.deepcopy(network).eval()
    prepared: Any = prepare(network)
    encoder = ("self_attn.in_proj_weight_linear", "self_attn.out_proj", "linear1", "linear2")
    cross = [f"multihead_attn.in_proj_weight_linear{number}" for number in ("", "_2", "_3")]
    decoder = (*encoder[:2], *cross, "multihead_attn.out_proj", *encoder[2:])
    assert layers(prepared) == (
        "projection",
        *(f"encoder.layers.{i}.{name}" for i in (0, 1) for name in encoder),
        *(f"decoder.{name}" for name in decoder),
        "head",
    )
    assert names < prepared.state_dict().keys()
    assert type(network.decoder) is kind
    x, mask = torch.randn(16, 5, 6), nn.Transformer.generate_square_subsequent_mask(5)
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared.eval()(x, mask), plain(x, mask))


class OwnBlock(nn.TransformerEncoderLayer):
    """Overrides a block of torch.nn's layer, and not its forward."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x) * 0.5


def test_a_subclass_of_a_transformer_layer_and_a_failed_trace() -> None:
    layer = OwnBlock(8, 2, 16, batch_first=True, dropout=0)
    x = torch.randn(4, 5, 8)
    expected = layer(x)
    prepared = prepare(layer)
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared(x), expected)

    class ByValue(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) if x.sum() > 0 else x

    broken = ByValue(OwnBlock(8, 2, 16))
    with pytest.raises(UntraceableError):
        prepare(broken)
    assert type(broken[0]) is OwnBlock


def test_a_vision_transformer() -> None:
    network = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
    nn.init.normal_(network.heads[-1].weight)  # torchvision starts it at zero
    prepared = prepare(network, backend="onednn")
    assert sum(".mlp." in name for name in layers(prepared)) == 4
    x = torch.randn(8, 3, 16, 16)
    train_steps(prepared, ((x,), {}))
    settle(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions_are_int8(dimensions: int) -> None:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    transposed: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    network = nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), transposed(8, 8, 2, 2), norm(8), nn.ReLU(), conv(8, 4, 1)
    )
    prepared = prepare(network, backend="x86")  # no engine adds 3d convolutions of 8 bits in 32 on every CPU
    assert layers(prepared) == ("0", "2", "5")
    x = torch.randn(8, 3, *[6] * dimensions)
    train_steps(prepared, ((x,), {}))
    settle(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30


class StubbedUp(nn.Module):
    """A transposed convolution between int8 layers, in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.up, self.out = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.out(self.up(self.conv(self.quant(x)))))


def test_transposed_convolutions_stay_float_in_eager_mode() -> None:
    prepared = prepare(StubbedUp(), backend="onednn")
    x = images()
    train_steps(prepared, ((x,), {}))
    settle(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30


def test_a_u_net_in_a_trainer(tmp_path: Path) -> None:
    class Segments(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), (batch[0].mean(1) > 0).long())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    module = Segments(UNet())
    qat = QuantizationAwareTraining(backend="onednn", output_dir=tmp_path)
    trainer(tmp_path, qat, max_epochs=4, enable_checkpointing=False).fit(module)
    x = images()
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 25  # type: ignore[misc]


class Pooled(nn.Module):
    """Concatenates what reshapes and means have made."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(16, CLASSES)
        nn.init.normal_(self.right.weight)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), F.relu(self.right(x))
        return self.fc(torch.cat([left.mean((2, 3)), right.flatten(2).mean(2)], 1))


def test_a_concatenation_has_one_grid() -> None:
    prepared = prepare(Pooled(), backend="onednn")
    x = images()
    train_steps(prepared, ((x,), {}))
    settle(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30


def test_a_layer_called_twice_is_one_layer() -> None:
    prepared: Any = prepare(Nested())
    calls = [str(n.target) for n in prepared.graph.nodes if n.op == "call_module"]
    assert calls.count("twice.0") == 2
    assert layers(prepared).count("twice.0") == 1


class Adversarial(TinyModule):
    """Two networks and two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        del self.model
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(8, 3 * 36), nn.Unflatten(1, (3, 6, 6)), nn.ConvTranspose2d(3, 3, 2, 2)
        )
        self.discriminator = nn.Sequential(
            ConvBnRelu(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        fake = self(torch.randn(len(batch[0]), 8))
        losses = (
            F.softplus(-self.discriminator(fake)).mean(),
            F.softplus(self.discriminator(fake.detach())).mean()
            + F.softplus(-self.discriminator(batch[0])).mean(),
        )
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
        for optimizer in optimizers:
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.discriminator(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters()) for net in (self.generator, self.discriminator)]


def test_two_networks_with_manual_optimization(tmp_path: Path) -> None:
    module = Adversarial()
    qat = QuantizationAwareTraining(backend="onednn", output_dir=tmp_path)
    trainer(tmp_path, qat, max_epochs=2, enable_checkpointing=False).fit(module)
    assert [name for name, _, _ in quantized_networks(module)] == ["generator", "discriminator"]
    int8: Any = qat.int8_module
    z, x = torch.randn(16, 8), images()
    with torch.no_grad():
        assert sqnr(module.eval()(z), int8(z)) > 25
        assert sqnr(module.discriminator(x), int8.discriminator(x)) > 20
    assert torch.equal(load_int8(tmp_path / "int8.pt", Adversarial())(z), int8(z))


class Distilled(TinyModule):
    """A student, and a float teacher in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Residual(16).eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert not any(m.training for m in self.teacher.modules())
        with torch.no_grad():
            target = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), target)


@pytest.mark.filterwarnings("ignore:Found .* module")  # Lightning's, of the teacher
def test_a_student_with_a_float_teacher(tmp_path: Path) -> None:
    module = Distilled()
    before = copy.deepcopy(module.teacher.state_dict())
    qat = QuantizationAwareTraining(modules=["model"], freeze_bn_at=1, backend="onednn")
    trainer(tmp_path, qat, max_epochs=3, enable_checkpointing=False).fit(module)
    assert type(module.teacher) is Residual
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    assert [name for name, _, _ in quantized_networks(qat.int8_module)] == ["model"]  # type: ignore[arg-type]
