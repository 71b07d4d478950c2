"""Networks of other packages that only capture follows, with random weights, and two calls of each.

The second call has another batch size, and another image size or length where the network allows one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.zoo_packages import transformers_network, yolo

Call = dict[str, Tensor]


class ZooNetwork(NamedTuple):
    """A network of another package.

    Attributes:
        build: Builds it.
        example: The call to capture.
        other: Another call.
    """

    build: Callable[[], nn.Module]
    example: Call
    other: Call


def _images(batch: int, size: int, name: str = "x") -> Call:
    return {name: torch.randn(batch, 3, size, size)}


def _tokens(batch: int, length: int) -> Call:
    lengths = torch.arange(length, length - batch, -1)
    return {
        "input_ids": torch.randint(1, 90, (batch, length)),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
    }


_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 100,
}  # fmt: skip
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
_PATCHES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
_SWIN = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
_SEGFORMER = {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "decoder_hidden_size": 16}
_MOBILEVIT = {"image_size": 64, "hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 6 + [16]}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_CONVNEXT = {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4}


def _vision(model: str, settings: dict[str, Any], *, resizable: bool = False) -> ZooNetwork:
    build = transformers_network(model, "ImageClassification", **settings)
    size = 96 if resizable else 64
    return ZooNetwork(build, _images(2, 64, "pixel_values"), _images(3, size, "pixel_values"))


def _timm(name: str, size: int, other: int | None = None) -> ZooNetwork:
    return ZooNetwork(lambda: timm.create_model(name), _images(2, size), _images(3, other or size))


def _torchvision(name: str, size: int) -> ZooNetwork:
    def build() -> nn.Module:
        made: nn.Module = torchvision.models.get_model(name)
        return made

    return ZooNetwork(build, _images(2, size), _images(3, size))


torch.manual_seed(0)
NETWORKS = {
    "BERT": ZooNetwork(
        transformers_network("Bert", "SequenceClassification", **_TEXT), _tokens(2, 12), _tokens(3, 9)
    ),
    "RoBERTa": ZooNetwork(
        transformers_network("Roberta", "SequenceClassification", **_TEXT),
        _tokens(2, 12),
        _tokens(3, 9),
    ),
    "DistilBERT": ZooNetwork(
        transformers_network("DistilBert", "SequenceClassification", **_DISTIL),
        _tokens(2, 12),
        _tokens(3, 9),
    ),
    "ViT": _vision("ViT", _PATCHES),
    "DeiT": _vision("DeiT", _PATCHES),
    "Swin": _vision("Swin", _SWIN),
    "ConvNeXt": _vision("ConvNext", _CONVNEXT, resizable=True),
    "ResNet": _vision("ResNet", _RESNET, resizable=True),
    # Its own ReLU6 becomes a ReLU when it is prepared, which is another function above 6.
    "MobileNetV2": _vision("MobileNetV2", {"depth_multiplier": 0.35, "hidden_act": "relu"}, resizable=True),
    "MobileViT": _vision("MobileViT", _MOBILEVIT),
    "Segformer": ZooNetwork(
        transformers_network("Segformer", "SemanticSegmentation", **_SEGFORMER),
        _images(2, 64, "pixel_values"),
        _images(3, 96, "pixel_values"),
    ),
    **{
        name: ZooNetwork(yolo(name), _images(2, 64), _images(3, 96))
        for name in ("yolov5n", "yolov8n", "yolo11n", "yolov8n-seg")
    },
    "timm mobilevit_xxs": _timm("mobilevit_xxs", 64),
    "timm mobilevitv2_050": _timm("mobilevitv2_050", 64),
    "timm tiny_vit_5m_224": _timm("tiny_vit_5m_224", 224),
    "timm efficientvit_b0": _timm("efficientvit_b0", 64, 96),
    "timm efficientformer_l1": _timm("efficientformer_l1", 224),
    "timm twins_svt_small": _timm("twins_svt_small", 224),
    "timm convit_tiny": _timm("convit_tiny", 224),
    "timm bat_resnext26ts": _timm("bat_resnext26ts", 256),
    "torchvision swin_t": _torchvision("swin_t", 64),
    "torchvision maxvit_t": _torchvision("maxvit_t", 224),
    "torchvision vit_b_16": _torchvision("vit_b_16", 224),
}
