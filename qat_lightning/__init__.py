"""Int8 quantization-aware training for PyTorch Lightning."""

from qat_lightning.analysis.keep_for_target import keep_for_target
from qat_lightning.analysis.preflight import NetworkReport, preflight
from qat_lightning.analysis.sensitivity import sensitivity
from qat_lightning.analysis.sensitivity_table import LayerSensitivity, Sensitivity
from qat_lightning.base.errors import (
    ConversionError,
    GuardError,
    Int8FileError,
    MissingExtraError,
    PreflightError,
    RankError,
    RankMismatchError,
    RecipeMismatchError,
    TargetError,
    UntraceableError,
)
from qat_lightning.callback import QuantizationAwareTraining
from qat_lightning.export import export_onnx, export_openvino, load_runtime
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.modes.qconfig import QConfig
from qat_lightning.post_training import PostTrainingQuantization
from qat_lightning.quantize.convert import convert
from qat_lightning.quantize.int8_file import load_int8, load_qat_checkpoint, save_int8
from qat_lightning.quantize.options import ModuleOptions, PrepareOptions
from qat_lightning.quantize.prepare import prepare
from qat_lightning.quantize.recipe import Recipe
from qat_lightning.run.checkpoints import latest_checkpoint
from qat_lightning.run.parts.accuracy_target import AccuracyTarget
from qat_lightning.run.parts.distillation import Distillation
from qat_lightning.run.requeue import RequeueBetweenSteps

__all__ = [
    "AccuracyTarget",
    "ConversionError",
    "Distillation",
    "FakeQuantize",
    "GuardError",
    "Int8FileError",
    "LayerSensitivity",
    "MissingExtraError",
    "ModuleOptions",
    "NetworkReport",
    "PostTrainingQuantization",
    "PreflightError",
    "PrepareOptions",
    "QConfig",
    "QuantizationAwareTraining",
    "RankError",
    "RankMismatchError",
    "Recipe",
    "RecipeMismatchError",
    "RequeueBetweenSteps",
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
