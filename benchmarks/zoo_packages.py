"""Networks of transformers and ultralytics, untrained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.zoo_entry import Entry, images, texts

_TEXT = ("Bert", "Roberta", "DistilBert")
_IMAGE = {
    "ViT": 224,
    "DeiT": 224,
    "Swin": 224,
    "ConvNext": 64,
    "ResNet": 64,
    "MobileNetV2": 64,
    "MobileViT": 256,
}
_YOLO = ("yolov5n", "yolov8n", "yolo11n", "yolov8n-seg", "yolo11n-seg")


def entries_of_packages() -> Iterator[Entry]:
    """Yields the networks of both packages."""
    for model in _TEXT:
        yield _transformers(model, "SequenceClassification", "32 tokens", texts(32))
    for model, size in _IMAGE.items():
        yield _transformers(model, "ImageClassification", str(size), images(size, "pixel_values"))
    yield _transformers("Segformer", "SemanticSegmentation", "64", images(64, "pixel_values"))
    for name in _YOLO:
        family = name.removesuffix("-seg").removesuffix("n")
        yield Entry(f"ultralytics/{name}", "ultralytics", family, "64", yolo(name), images(64))


def transformers_network(model: str, task: str, **settings: Any) -> Callable[[], nn.Module]:
    """Returns what builds a network of transformers, by default in the size of its config class."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{model}Config")(**settings)
        made: nn.Module = getattr(transformers, f"{model}For{task}")(config)
        return made

    return build


def yolo(name: str) -> Callable[[], nn.Module]:
    """Returns what builds a network of ultralytics."""

    def build() -> nn.Module:
        from ultralytics.nn import tasks

        kind = tasks.SegmentationModel if "-seg" in name else tasks.DetectionModel
        made: nn.Module = kind(f"{name}.yaml", verbose=False)
        return made

    return build


def _transformers(model: str, task: str, size: str, call: Callable[[], Any]) -> Entry:
    build = transformers_network(model, task)
    return Entry(f"transformers/{model}", "transformers", model, size, build, call)
