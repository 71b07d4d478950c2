from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from qat_lightning import UntraceableError, convert, prepare
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.lowering.int8.arithmetic import Sum
from tests.networks import ConvBnRelu, Residual, images, leaves, sqnr, train_steps

# Networks whose forward differs between training and eval mode, each in its own way: stochastic depth
# by module or function, functional dropout with self.training, auxiliary outputs, drop path.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin_t": lambda: models.swin_t(num_classes=4),
    "efficientnet_b0": lambda: models.efficientnet_b0(num_classes=4),
    "googlenet": lambda: models.googlenet(num_classes=4, init_weights=False),
    # With blocks that begin at zero, dropping them would change nothing.
    "timm_drop_path": lambda: timm.create_model(
        "resnet10t", num_classes=4, drop_path_rate=0.5, zero_init_last=False
    ),
}


def evaluate(prepared: nn.Module) -> None:
    """Eval mode with the observers off, as the callback evaluates."""
    prepared.eval()
    set_enabled(prepared, observer=False, fake_quant=True)


@pytest.mark.parametrize("name", MODELS)
def test_prepared_and_int8_follow_train_and_eval(name: str) -> None:
    network = MODELS[name]()
    x = torch.randn(2, 3, 64, 64)
    reference = copy.deepcopy(network)
    prepared = prepare(network)
    for training in (True, False):
        expected, output = reference.train(training)(x), prepared.train(training)(x)
        assert type(output) is type(expected)
        assert [leaf.shape for leaf in leaves(output)] == [leaf.shape for leaf in leaves(expected)]
    with torch.no_grad():
        assert not torch.equal(*(leaves(prepared.train()(x))[0] for _ in range(2)))
        evaluate(prepared)
        assert torch.equal(prepared(x), prepared(x))
        int8 = convert(prepared)
        output = int8(x)
    assert isinstance(output, Tensor)
    assert torch.equal(output, int8(x))
    assert torch.isfinite(output).all()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in int8.modules()) or name == "swin_t"


class Both(nn.Module):
    """A changing output structure and dropouts by `self.training`, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBnRelu()
        self.fc, self.auxiliary = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        features = F.dropout2d(self.body(x), 0.5, self.training).mean((2, 3))
        if self.training:
            return {"main": self.fc(features), "auxiliary": self.auxiliary(features)}
        return self.fc(features)


def test_dropout_is_alive_in_training_only() -> None:
    prepared = prepare(Residual())
    x = images(64)
    train_steps(prepared, ((x,), {}))
    zeros = []
    prepared.fc.register_forward_pre_hook(  # type: ignore[operator, union-attr]
        lambda m, args: zeros.append(float((args[0] == 0).float().mean()))
    )
    with torch.no_grad():
        prepared.train()(x), prepared.eval()(x)
    assert zeros[0] - zeros[1] == pytest.approx(0.2, abs=0.08)


def test_outputs_by_mode() -> None:
    prepared = prepare(Both())
    x = images()
    output = prepared.train()(x)
    assert list(output) == ["main", "auxiliary"]
    sum(leaf.sum() for leaf in output.values()).backward()
    assert prepared.auxiliary.weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert prepared.eval()(x).shape == (16, 4)
    int8 = convert(prepared)
    assert int8(x).shape == (16, 4)
    assert not hasattr(int8, "auxiliary") or not list(int8.auxiliary.parameters())  # type: ignore[union-attr]


class Decorated(Residual):
    """A network with attributes and methods that its user reads and calls."""

    default_size = (12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.labels = ["cat", "dog"]
        self.config = {"depth": 2}

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_attributes_are_preserved_and_methods_say_what_to_do(converted: bool, copied: bool) -> None:
    network: Any = prepare(Decorated())
    if converted:
        train_steps(network, ((images(),), {}))
        network = convert(network)
    if copied:
        network = copy.deepcopy(network)
    assert copied or type(network).__name__ == "Decorated"
    assert (network.labels, network.config, network.default_size) == (["cat", "dog"], {"depth": 2}, (12, 12))
    assert network.classes == 4
    with pytest.raises(AttributeError, match=r"'features' is gone.*modules=\[\"model\.features\"\]"):
        network.features(images())
    with pytest.raises(
        AttributeError, match=r"its part 'stem' cannot be called.*modules=\[\"model\.stem\"\]"
    ):
        network.stem(images())


def test_the_fix_that_the_error_names_works() -> None:
    """Quantizing the part keeps the methods around it."""
    network: Any = Decorated()
    network.stem = prepare(network.stem)
    assert network.features(images()).shape == (16, 8, 10, 10)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line
            return self.fc(x)
        return x


def test_an_untraceable_network_gets_its_class_file_and_line() -> None:
    source, start = inspect.getsourcelines(Untraceable)
    line = start + next(i for i, text in enumerate(source) if "# the line" in text)
    with pytest.raises(UntraceableError) as caught:
        prepare(Untraceable())
    message = str(caught.value)
    assert "torch.fx cannot trace Untraceable" in message
    assert f"{__file__}:{line}: if x.sum() > 0:" in message
    assert "modules=[…]" in message
    assert "mode='eager'" in message


class Rerouted(nn.Module):
    """Calls a layer in eval mode that training mode skips: no one graph does both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.training:
            x = self.second(x)
        return x


def test_a_layer_that_only_eval_mode_calls_is_refused() -> None:
    with pytest.raises(UntraceableError, match="Rerouted calls its layer 'second' in eval mode") as caught:
        prepare(Rerouted())
    assert __file__ in str(caught.value)


def test_a_failed_preparation_leaves_the_network_as_it_was() -> None:
    network = Rerouted().eval()
    before = {name: type(module) for name, module in network.named_modules()}
    with pytest.raises(UntraceableError):
        prepare(network)
    assert {name: type(module) for name, module in network.named_modules()} == before
    assert not any(module.training for module in network.modules())
    assert network(torch.randn(2, 4)).shape == (2, 4)


class NoisyInner(nn.Module):
    """Reads `self.training`, and holds a layer: traced into, not left whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + torch.randn_like(x) if self.training else x


def test_noise_in_training_only() -> None:
    network = nn.Sequential(NoisyInner(), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
    prepared = prepare(network)
    x = images(4)
    with torch.no_grad():
        assert not torch.equal(prepared.train()(x), prepared(x))
        evaluate(prepared)
        assert torch.equal(prepared(x), prepared(x))


class Tokens(nn.Module):
    """A class token beside reshaped pixels, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
        self.token = nn.Parameter(torch.full((1, 1, 8), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.fc(x)


def test_what_is_concatenated_is_on_one_grid_from_the_layer_that_made_it() -> None:
    torch.manual_seed(0)
    prepared = prepare(Tokens(), backend="onednn").train()
    x = torch.randn(8, 3, 12, 12)
    for _ in range(3):
        prepared(x)
    expected = prepared.eval()(x)
    assert sqnr(expected, convert(prepared)(x)) > 45  # PyTorch's warning of unequal grids would be an error


class Spelled(nn.Module):
    """A ReLU, by one of its names."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


SPELLINGS = [torch.relu, torch.relu_, F.relu, lambda x: x.relu(), lambda x: x.relu_()]


@pytest.mark.parametrize("relu", SPELLINGS, ids=range(5))
def test_a_relu_is_fused_however_it_is_spelled(relu: Callable[[Tensor], Tensor]) -> None:
    prepared = prepare(Spelled(relu)).train()
    prepared(torch.randn(2, 3, 8, 8))
    int8: Any = convert(prepared)
    assert int8.conv.relu


class SpelledAfterSum(Spelled):
    """The same after a sum, before another convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.conv(self.relu(y + 1.5 * y)[:, :3])


@pytest.mark.parametrize("relu", SPELLINGS, ids=range(5))
def test_a_relu_after_a_sum_is_int8_however_it_is_spelled(relu: Callable[[Tensor], Tensor]) -> None:
    prepared = prepare(SpelledAfterSum(relu)).train()
    prepared(torch.randn(2, 3, 8, 8))
    (both,) = (module for module in convert(prepared).modules() if isinstance(module, Sum))
    assert both.relu
