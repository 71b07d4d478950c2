from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights

from qat_lightning.tasks.models import (
    DigitsCNN,
    replace_heads,
    timm_model,
    torchvision_model,
    torchvision_quantizable,
)


def outputs(network: nn.Module, *shape: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(network.eval()(torch.zeros(2, *shape)).shape)


def test_digits_cnn() -> None:
    assert outputs(DigitsCNN(), 1, 8, 8) == (2, 10)
    assert outputs(DigitsCNN(num_classes=3, width=8), 1, 16, 16) == (2, 3)
    assert sum(weight.numel() for weight in DigitsCNN().parameters()) == 56_554


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_model(name: str) -> None:
    assert outputs(torchvision_model(name, num_classes=7), 3, 32, 32) == (2, 7)


def test_torchvision_quantizable_is_float_and_has_stubs() -> None:
    network = torchvision_quantizable("mobilenet_v2", num_classes=7)
    assert outputs(network, 3, 32, 32) == (2, 7)
    assert any(isinstance(layer, torch.ao.quantization.QuantStub) for layer in network.modules())


def test_timm_model() -> None:
    assert outputs(timm_model("mobilenetv3_small_050", num_classes=7), 3, 32, 32) == (2, 7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torchvision_model("resnet81"), "torchvision network: 'resnet81'.*resnet18"),
        (lambda: torchvision_quantizable("resnet19"), "quantizable .* 'resnet19'.*resnet18"),
        (lambda: timm_model("resnet81"), "timm network: 'resnet81'.*resnet18"),
        (lambda: torchvision_model("resnet18", weights="V1"), "weights of resnet18: 'V1'.*_V1"),
    ],
)
def test_unknown_names_get_the_nearest(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_timm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "qat-lightning\[timm\]"'):
        timm_model("resnet18")


@pytest.mark.parametrize("quantizable", [False, True])
def test_published_weights_keep_all_but_the_head(monkeypatch: pytest.MonkeyPatch, quantizable: bool) -> None:
    published = torchvision_model("resnet18").state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **_: published)
    build = torchvision_quantizable if quantizable else torchvision_model
    same = build("resnet18", weights="IMAGENET1K_V1").state_dict()
    assert all(torch.equal(same[key], value) for key, value in published.items())
    other = build("resnet18", weights="DEFAULT", num_classes=7).state_dict()
    assert other["fc.weight"].shape == (7, 512)
    assert torch.equal(other["conv1.weight"], published["conv1.weight"])


def test_replace_heads_reaches_auxiliary_classifiers() -> None:
    network = torchvision_model("googlenet", init_weights=False)
    replace_heads(network, 1000, 7)
    assert [tuple(each.shape) for each in network(torch.zeros(2, 3, 64, 64))] == [(2, 7)] * 3
