"""Int8 quantization-aware training for PyTorch Lightning."""

from qat_lightning.callback import QuantizationAwareTraining
from qat_lightning.checkpoints import latest_checkpoint
from qat_lightning.errors import (
    ConversionError,
    Int8FileError,
    MissingExtraError,
    PreflightError,
    RankError,
    RankMismatchError,
    RecipeMismatchError,
    TargetError,
    UntraceableError,
)
from qat_lightning.export import export_onnx, export_openvino, load_runtime
from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.files import load_int8, load_qat_checkpoint, save_int8
from qat_lightning.inspection import NetworkReport, preflight
from qat_lightning.layer_sensitivity import sensitivity
from qat_lightning.post_training import PostTrainingQuantization
from qat_lightning.quantize import convert, prepare
from qat_lightning.recipe import Recipe
from qat_lightning.sensitivities import LayerSensitivity, Sensitivity
from qat_lightning.target import keep_for_target

__all__ = [
    "ConversionError",
    "FakeQuantize",
    "Int8FileError",
    "LayerSensitivity",
    "MissingExtraError",
    "NetworkReport",
    "PostTrainingQuantization",
    "PreflightError",
    "QuantizationAwareTraining",
    "RankError",
    "RankMismatchError",
    "Recipe",
    "RecipeMismatchError",
    "Sensitivity",
    "TargetError",
    "UntraceableError",
    "convert",
    "export_onnx",
    "export_openvino",
    "keep_for_target",
    "latest_checkpoint",
    "load_int8",
    "load_qat_checkpoint",
    "load_runtime",
    "preflight",
    "prepare",
    "save_int8",
    "sensitivity",
]
