"""Builds networks by name: a small one for digits, torchvision's, and timm's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torchvision
from torch import Tensor, nn

from qat_lightning.base.errors import MissingExtraError, nearest


class DigitsCNN(nn.Module):
    """A residual network for digits, 56,554 parameters, in plain float code.

    It has two convolutions, a residual block at half the height and width, and global average pooling. It
    reaches about 99 % on the digits of scikit-learn.

    Args:
        num_classes: Length of the output.
        width: Channels of the first layer. The later layers have twice as many.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, width)
        self.grow = _conv_bn_relu(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.block = _conv_bn_relu(2 * width, 2 * width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch x `num_classes`) of images (batch x 1 x 8 x 8, or larger)."""
        features = self.pool(self.grow(self.stem(images)))
        features = self.relu(self.block(features) + features)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def torchvision_model(
    name: str, *, weights: str | None = None, num_classes: int = 1000, **options: Any
) -> nn.Module:
    """Builds one of torchvision's float classification networks.

    Args:
        name: Its name in torchvision, such as `resnet18`, `mobilenet_v2`, `efficientnet_b0`.
        weights: Published weights to download, such as `DEFAULT` or `IMAGENET1K_V1`. None for random
            weights.
        num_classes: Length of the output. If the published weights have another number of classes, new layers
            replace those that output the classes.
        **options: Further arguments of torchvision's builder.

    Raises:
        ValueError: torchvision has no such network or no such weights. The message names the nearest.
    """
    _check_known("torchvision network", name, torchvision.models.list_models(torchvision.models))
    return _torchvision(name, name, weights, num_classes, options)


def torchvision_quantizable(
    name: str, *, weights: str | None = None, num_classes: int = 1000, **options: Any
) -> nn.Module:
    """Builds one of torchvision's quantizable networks in float, with quant stubs for eager mode.

    Args:
        name: `mobilenet_v2`, `resnet18`, `googlenet`, …: the names in
            `torchvision.models.quantization`.
        weights: Published float weights to download, such as `IMAGENET1K_V1`. None for random weights.
        num_classes: As in `torchvision_model`.
        **options: Further arguments of torchvision's builder.

    Raises:
        ValueError: torchvision has no such network or no such weights. The message names the nearest.
    """
    known = torchvision.models.list_models(torchvision.models.quantization)
    names = [each.removeprefix("quantized_") for each in known]
    _check_known("quantizable torchvision network", name, names)
    options["quantize"] = False
    return _torchvision(f"quantized_{name}", name, weights, num_classes, options)


def timm_model(name: str, *, pretrained: bool = False, num_classes: int = 1000, **options: Any) -> nn.Module:
    """Builds one of timm's networks.

    Args:
        name: Its name in timm, such as `resnet18` or `mobilenetv3_large_100`, with or without a tag.
        pretrained: Whether to download published weights. timm replaces the last layer if `num_classes`
            differs.
        num_classes: Length of the output.
        **options: Further arguments of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        MissingExtraError: timm is not installed.
        ValueError: timm has no such network. The message names the nearest.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm", "A network of timm") from error
    _check_known("timm network", name.split(".")[0], timm.list_models())
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    return network


def replace_heads(network: nn.Module, old_classes: int, num_classes: int) -> None:
    """Replaces, in place, every layer with `old_classes` outputs by a new one with `num_classes`.

    Args:
        network: A classifier. The output layers of its auxiliary classifiers are replaced, too.
        old_classes: Number of outputs of the layers to replace: `nn.Linear`, or `nn.Conv2d` as in SqueezeNet.
        num_classes: Number of outputs of the new layers. They get PyTorch's default initialisation.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == old_classes:
            bias = layer.bias is not None
            network.set_submodule(name, nn.Linear(layer.in_features, num_classes, bias=bias))
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == old_classes:
            conv = nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size)  # type: ignore[arg-type]
            network.set_submodule(name, conv)


def _torchvision(
    registered: str, name: str, weights: str | None, num_classes: int, options: dict[str, Any]
) -> nn.Module:
    network: nn.Module
    if weights is None:
        network = torchvision.models.get_model(registered, num_classes=num_classes, **options)
        return network
    choices = torchvision.models.get_model_weights(name)
    _check_known(f"weights of {name}", weights, choices.__members__)
    published = len(choices[weights].meta["categories"])
    network = torchvision.models.get_model(registered, weights=weights, **options)
    if num_classes != published:
        replace_heads(network, published, num_classes)
    return network


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise ValueError(f"Unknown {what}: {name!r}. {nearest(name, known)}")
