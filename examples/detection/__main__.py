"""A YOLO in int8: trains one in float, trains it on for int8, and prints what int8 costs.

python -m examples.detection
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table

from examples.detection.detector import Detector
from examples.detection.scenes import SceneData
from examples.trainers import trainer
from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining
from qat_lightning.cli.console import ignore_advice

FILES = {".pt": "int8", ".onnx": "int8 in ONNX Runtime", ".xml": "int8 in OpenVINO"}


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24, help="epochs of float training")
    parser.add_argument("--tuning", type=int, default=4, help="epochs after them, for int8 and in float")
    parser.add_argument("--scenes", type=int, default=768, help="scenes to train with")
    parser.add_argument("--tested", type=int, default=400, help="scenes to test with")
    parser.add_argument("--width", type=float, default=0.125, help="share of the channels; 0.25 is YOLOv8n")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the float training")
    parser.add_argument("--tuning-lr", type=float, default=1e-4, help="learning rate after it")
    parser.add_argument("--backend", default="onednn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/detection"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_advice()
    seed_everything(args.seed, verbose=False)

    data = SceneData({"train": args.scenes, "val": 64, "test": args.tested})
    start = Detector(args.lr, args.width)
    trainer(max_epochs=args.epochs).fit(start, data)

    def fresh() -> Detector:
        module = Detector(args.tuning_lr, args.width)
        module.load_state_dict(start.state_dict())
        return module

    floating, trained = fresh(), fresh()
    trainer(max_epochs=args.tuning).fit(floating, data)  # for a comparison on the same budget
    ptq = PostTrainingQuantization(backend=args.backend)
    trainer(ptq).validate(floating, data, verbose=False)

    qat = QuantizationAwareTraining(
        backend=args.backend, export=["torch", "onnx", "openvino"], output_dir=args.folder
    )
    trainer(qat, max_epochs=args.tuning).fit(trained, data)

    forms: dict[str, Any] = {
        "float": floating,
        "int8, not trained": ptq.int8_module,
        "fake-quant": trained,
    }
    forms |= {FILES[path.suffix]: qat.shipped(fresh(), path) for path in qat.exported}
    table = Table("form", "mAP", "mAP at IoU 0.5", title="Percent")
    for name, form in forms.items():
        (scores,) = trainer().test(form, data, verbose=False)
        table.add_row(name, *(f"{100 * scores[metric]:.2f}" for metric in ("mAP", "mAP50")))
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
