"""Reports to show: a realistic one, and ones at the limits of what there can be."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from qat_lightning.report.content import Epoch, Layer, Machine, Mark, Network, Report, Score, Speed

HOSTILE = "<script>alert(1)</script>\"'&${x}{{y}} #010005 \N{CJK UNIFIED IDEOGRAPH-5C42}\x00"


def realistic() -> Report:
    """As of a MobileNetV3-Large, trained for ten epochs and run by three runtimes."""
    return Report(
        title="MobileNetV3-Large on Imagenette",
        created="2026-03-14 15:09",
        source="checkpoints/epoch=8-step=2655.ckpt",
        versions={
            "qat-lightning": "0.1.0",
            "torch": "2.15.0",
            "lightning": "2.6.6",
            "torchvision": "0.29.2",
            "onnx": "1.20.0",
            "onnxruntime": "1.24.1",
            "openvino": "2026.1.0",
        },
        machine=Machine("Intel(R) Xeon(R) Platinum 8481C @ 2.70GHz", ("avx512_vnni", "amx_int8"), 4, 1),
        scores=_scores(),
        speeds=_speeds(),
        epochs=tuple(_epoch(epoch, random.Random(epoch)) for epoch in range(10)),
        marks=(Mark(1, "fake-quantization on"), Mark(6, "observers frozen"), Mark(8, "batch-norms frozen")),
        networks=(_network("", _mobilenet_names()),),
        findings=(
            "Int8 loses 0.36 percentage points of val/accuracy against float and is 3.76 times smaller.",
            "OpenVINO runs it fastest: 2.63 times as fast as float on the same runtime, batch 1.",
            "features.15.block.2.fc2 loses 9.4 dB, the most of all layers: 1.9 % of its outputs are clipped.",
            "Two operations stay float and cost a dequantization and a quantization each.",
        ),
    )


def large() -> Report:
    """Two networks, one of 120 layers with long names; forty metrics; a hundred epochs."""
    names = [
        f"encoder.stages.{index // 10}.blocks.{index % 10}.attention.projection_{index}"
        for index in range(120)
    ]
    epochs = [
        Epoch(epoch, {f"val/a_metric_of_some_length_{index}": math.sin(epoch + index) for index in range(40)})
        for epoch in range(100)
    ]
    return dataclasses.replace(
        realistic(),
        epochs=tuple(epochs),
        networks=(_network("generator", names), _network("discriminator", _mobilenet_names()[:20])),
        findings=("x" * 300, " ".join(["A finding."] * 40)),
    )


def hostile() -> Report:
    """Markup and strange characters wherever there is a name."""
    report = realistic()
    layers = [
        dataclasses.replace(layer, name=f"{HOSTILE}.{index}", kind=HOSTILE, fake_quant_sqnr=sqnr)
        for index, (layer, sqnr) in enumerate(
            zip(report.networks[0].layers, (math.nan, -math.inf, math.inf, -3.0, 0.0), strict=False)
        )
    ]
    flat = dataclasses.replace(layers[4], edges=(0.0, 0.0), grid=(0.0, 0.0), counts=(7, 0))
    network = dataclasses.replace(
        report.networks[0],
        name=HOSTILE,
        recipe={HOSTILE: HOSTILE},
        fused={HOSTILE: 3},
        floats=(HOSTILE,),
        layers=(*layers[:4], flat),
    )
    values = {HOSTILE: math.nan, "val/accuracy": math.inf, "val/loss": 0.0}
    return Report(
        title=HOSTILE,
        created=HOSTILE,
        source=HOSTILE,
        versions={HOSTILE: HOSTILE},
        machine=Machine(HOSTILE, (HOSTILE,), 1, 1),
        scores=(
            Score("float", HOSTILE, values, HOSTILE, HOSTILE, 1),
            Score("int8", HOSTILE, values, HOSTILE, HOSTILE, 0),
        ),
        speeds=(Speed(HOSTILE, HOSTILE, 1, 1.0, 0.0), Speed(HOSTILE, HOSTILE, 7, 1e-3, 0.5, 1e4)),
        epochs=(Epoch(0, {HOSTILE: 1.0, "val/loss": math.nan, "lr-Adam": 1e-9}),),
        marks=(Mark(0, HOSTILE), Mark(99, HOSTILE)),
        networks=(network,),
        findings=(HOSTILE,),
    )


def tiny() -> Report:
    """One network of one layer."""
    layer = Layer("fc", "Linear", 40.0, math.inf, 0.0, 0.0, (-1.0, 1.0), (-0.5, 0.5), (1, 2, 1))
    return dataclasses.replace(
        empty(),
        scores=(Score("float", "PyTorch", {"val/accuracy": 1.0}, "val"),),
        epochs=(Epoch(0, {"val/accuracy": 1.0}),),
        networks=(Network("", {"mode": "fx"}, {}, (), 1.0, (layer,)),),
    )


def empty() -> Report:
    """Nothing but what every report has."""
    return Report("", "2026-01-31 12:00", "last", {}, Machine("", (), 1, 1))


EVERY = (realistic, large, hostile, tiny, empty)


def _scores() -> tuple[Score, ...]:
    folder = "outputs/2026-03-14/15-02-11/"
    return tuple(
        Score(
            network,
            runtime,
            {"val/accuracy": accuracy, "val/loss": loss},
            "val",
            file and folder + file,
            size,
        )
        for network, runtime, accuracy, loss, file, size in (
            ("float", "PyTorch", 0.9712, 0.1031, None, 16_934_216),
            ("fake-quant", "PyTorch", 0.9684, 0.1102, "checkpoints/best.ckpt", None),
            ("int8", "PyTorch", 0.9679, 0.1109, "int8.pt", 4_689_312),
            ("int8", "ONNX Runtime", 0.9676, 0.1113, "int8.onnx", 4_502_890),
            ("int8", "OpenVINO", 0.9671, 0.1120, "int8.xml", 4_811_204),
        )
    )


def _speeds() -> tuple[Speed, ...]:
    return tuple(
        Speed(name, runtime, batch, duration * batch**0.92, 0.03 * duration * batch**0.92, speedup)
        for runtime, plain, ratio in (
            ("PyTorch", 14.2, 1.74),
            ("ONNX Runtime", 7.31, 2.21),
            ("OpenVINO", 6.12, 2.63),
        )
        for batch in (1, 32)
        for name, duration, speedup in (("float", plain, None), ("int8", plain / ratio, ratio))
    )


def _epoch(epoch: int, random: random.Random) -> Epoch:
    gain = 1 - math.exp(-(epoch + 1) / 2.5)
    return Epoch(
        epoch,
        {
            "train/loss": 0.85 - 0.68 * gain + 0.01 * random.random(),
            "val/loss": 0.55 - 0.42 * gain + 0.03 * random.random(),
            "train/accuracy": 0.74 + 0.23 * gain,
            "val/accuracy": 0.86 + 0.108 * gain + 0.004 * random.random(),
            "lr-AdamW": 1e-3 * (1 + math.cos(math.pi * epoch / 10)) / 2 + 1e-6,
            "grad_norm": 3.0 - 2 * gain + random.random(),
        },
    )


def _mobilenet_names() -> list[str]:
    names = ["features.0.0"]
    for block in range(1, 16):
        parts = (
            ["0.0", "1.0", "2.fc1", "2.fc2", "3.0"]
            if block in (4, 5, 6, 11, 12, 13, 14, 15)
            else ["0.0", "1.0"]
        )
        names += [f"features.{block}.block.{part}" for part in parts]
    names += [f"features.{block}.block.2.0" for block in (2, 3, 7, 8, 9)]
    return [*names, "features.16.0", "classifier.0"]


def _network(name: str, names: Sequence[str]) -> Network:
    return Network(
        name,
        recipe={"backend": "x86", "mode": "fx", "qconfig": "per-channel weights, 8-bit activations"},
        fused={"Conv2d+BatchNorm2d+Hardswish": 21, "Conv2d+BatchNorm2d+ReLU": 11, "Conv2d+BatchNorm2d": 14},
        floats=(
            "features.4.block.2 (mul): a float operation between int8 ones, misc.py:259: return scale * x",
            "classifier.3 (Linear): the last layer, which keep_float names",
        ),
        int8_share=0.987,
        layers=tuple(_layer(index, each, len(names)) for index, each in enumerate(names)),
    )


def _layer(index: int, name: str, count: int) -> Layer:
    dice = random.Random(name)
    relu = index % 3 == 1
    kind = "Linear" if "fc" in name or "classifier" in name else "Conv2d+BatchNorm2d" + "+ReLU" * relu
    scale = dice.uniform(0.5, 3)
    low, high = (0.0 if relu else -6 * scale), 6 * scale
    counts = []
    for step in range(64):
        x = (low + (high - low) * (step + 0.5) / 64) / scale
        counts.append(
            int(2e5 * math.exp(-(abs(x) ** 1.3)) * dice.uniform(0.7, 1.3))
            + (300_000 if relu and not step else 0)
        )
    clip = dice.uniform(0.6, 1.0)
    return Layer(
        name,
        kind,
        fake_quant_sqnr=dice.gauss(31 - 10 * index / count, 3),
        int8_sqnr=math.inf if dice.random() < 0.4 else dice.gauss(47, 4),
        loss=max(0.1, dice.gauss(2, 2)),
        clipped=max(0.0, 0.9 - clip) ** 2 / 4,
        grid=(0.0 if relu else -clip * high, clip * high),
        edges=(low, high),
        counts=tuple(counts),
    )
