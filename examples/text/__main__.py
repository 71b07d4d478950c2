"""Trains a small BERT in float and then for int8, and prints the accuracy of every form.

python -m examples.text
python -m examples.text --attention eager
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, seed_everything
from rich.console import Console
from rich.table import Table

from examples.text.classifier import Classifier
from examples.text.data import Reviews
from examples.trainers import trainer
from qat_lightning import NetworkReport, PostTrainingQuantization, QuantizationAwareTraining
from qat_lightning.cli.console import ignore_advice

FORMATS = {"int8.pt": "int8 in PyTorch", "int8.onnx": "int8 in ONNX Runtime", "int8.xml": "int8 in OpenVINO"}


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reviews", type=int, default=16000, help="to train on")
    parser.add_argument("--tested", type=int, default=2000, help="reviews to test with")
    parser.add_argument("--epochs", type=int, default=6, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=2, help="of training for int8 after it")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the float training")
    parser.add_argument("--qat-lr", type=float, default=2e-4, help="and of the training for int8")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="of transformers")
    parser.add_argument("--backend", default="onednn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/text"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_advice()
    seed_everything(args.seed, verbose=False)
    begin = time.monotonic()

    data = Reviews(args.reviews, args.tested, seed=args.seed)
    module = Classifier(len(data.tokenizer), args.lr, args.attention)
    trainer(max_epochs=args.epochs).fit(module, data)

    tuned = copy.deepcopy(module)
    tuned.lr = args.qat_lr
    qat = QuantizationAwareTraining(
        backend=args.backend, export=["torch", "onnx", "openvino"], output_dir=args.output
    )
    trainer(qat, max_epochs=args.qat_epochs).fit(tuned, data)

    ptq = PostTrainingQuantization(backend=args.backend)
    trainer(ptq, limit_val_batches=8).validate(module, data, verbose=False)

    forms: dict[str, Any] = {"float": module, "int8, not trained": ptq.int8_module, "fake-quant": tuned}
    for path in qat.exported:
        fresh = Classifier(len(data.tokenizer), args.qat_lr, args.attention)
        forms[FORMATS[path.name]] = qat.shipped(fresh, path)
    scores = {name: tested(form, data) for name, form in forms.items()}
    console = Console(soft_wrap=True)
    console.print(table(scores))
    console.print(in_words(*qat.preflight_reports), f"{time.monotonic() - begin:.0f} s.", highlight=False)


def tested(module: LightningModule, data: Reviews) -> float:
    """Returns the accuracy on the test reviews."""
    (metrics,) = trainer().test(module, data, verbose=False)
    return metrics["test/accuracy"]


def table(scores: dict[str, float]) -> Table:
    """Returns the accuracy of each form, and its difference from float in percentage points."""
    rows = Table("form", "accuracy, %", "against float", title="Reviews: positive, negative or mixed")
    for name, score in scores.items():
        difference = "" if name == "float" else f"{100 * (score - scores['float']):+.2f}"
        rows.add_row(name, f"{100 * score:.2f}", difference)
    return rows


def in_words(report: NetworkReport) -> str:
    """Describes which share of the network is int8."""
    layers = report.layers + len(report.float_layers)
    return f"{report.layers} of {layers} layers are int8, {report.int8_share:.1%} of the multiply-adds."


if __name__ == "__main__":
    main()
