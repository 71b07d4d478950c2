"""Finds what stands out in a report, and says it in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from qat_lightning.export.executed import in_words
from qat_lightning.report.content import Layer, Machine, Network, Report, Score, Speed
from qat_lightning.report.machine import has_vnni

_LOSS = 6.0
"""Decibels that a layer may lose: one bit of precision."""
_POOR = 25.0
"""SQNR against float, in decibels, below which a layer's loss is worth a finding."""
_CLIPPED = 0.01
"""Share of its outputs that a layer may clip."""
_LOW = 20.0
"""SQNR against fake-quant, in decibels, below which an int8 layer no longer computes what was trained."""
_POINTS = 0.5
"""Difference from float, in percentage points, from which an accuracy is worth a finding."""
_SLOW = 1.05
"""Speed-up below which int8 is no faster than float."""
_SHOWN = 3
"""Most layers that one kind of finding names."""
_NOISE = 0.25
"""Spread, as a share of the median, above which a speed means little."""


def findings(report: Report, float_operations: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Returns the findings of a report.

    Args:
        report: The report, without its findings.
        float_operations: For each runtime, how many operations of each kind it runs in float between int8
            operations.

    Returns:
        Sentences, the most important first. Empty if nothing stands out.
    """
    return (
        *_accuracy(report.scores),
        *_speed(report, float_operations),
        *(sentence for network in report.networks for sentence in _layers(network)),
        *_backend(report.networks, report.machine),
    )


def _accuracy(scores: Iterable[Score]) -> Iterator[str]:
    """Compares the accuracies of every other network and file with those of float."""
    scores = list(scores)
    start = next((score for score in scores if score.network == "float"), None)
    for score in scores:
        if start is None or score.network == "float":
            continue
        for name in (n for n in score.metrics if "acc" in n.lower() and n in start.metrics):
            points = 100 * (score.metrics[name] - start.metrics[name])
            if abs(points) >= _POINTS:
                verb = "gains" if points > 0 else "loses"
                yield f"{_title(score)} {verb} {abs(points):.1f} points of {name} against float."


def _title(score: Score) -> str:
    return score.network if score.runtime == "PyTorch" else f"{score.network} in {score.runtime}"


def _speed(report: Report, operations: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Says where int8 is no faster than float, and why."""
    slow: dict[str, list[Speed]] = {}
    for speed in report.speeds:
        if speed.speedup is not None and speed.speedup < _SLOW:
            slow.setdefault(speed.runtime, []).append(speed)
    for runtime, found in slow.items():
        ratios = ", ".join(f"{speed.speedup:.2f} at batch {speed.batch}" for speed in found)
        yield (
            f"Int8 in {runtime} is no faster than float (speed-up {ratios}), "
            f"{_why_slow(report, operations.get(runtime, {}))}."
        )
    noisy = [speed for speed in report.speeds if speed.spread > _NOISE * speed.milliseconds]
    if noisy:
        yield (
            f"{len(noisy)} of {len(report.speeds)} speeds varied by more than {_NOISE:.0%} between calls: "
            "something else used the CPU. Measure again when it is idle."
        )


def _why_slow(report: Report, operations: Mapping[str, int]) -> str:
    if not has_vnni(report.machine):
        return "because this CPU has no int8 dot products (VNNI)"
    if operations:
        return f"because {in_words(Counter(operations))}, and each converts from and to int8"
    floats = sum(len(network.floats) for network in report.networks)
    if floats:
        return f"because {floats} layers or operations stay float, and each converts from and to int8"
    return "probably because its operations are so small that starting them takes longer than computing them"


def _layers(network: Network) -> Iterator[str]:
    """Names the layers that lose most, that clip most, and whose int8 outputs differ most from fake-quant."""
    poor = [layer for layer in network.layers if layer.fake_quant_sqnr < _POOR]
    for layer in _worst(poor, lambda each: each.loss, _LOSS):
        yield (
            f"Layer {layer.name} loses {layer.loss:.0f} dB between its input and its output. If accuracy "
            f"matters, keep it float (keep_float=[{layer.name!r}])."
        )
    for layer in _worst(network.layers, lambda each: each.clipped, _CLIPPED):
        yield (
            f"Layer {layer.name} clips {layer.clipped:.1%} of its outputs: its range froze too early, or it "
            "has rare outliers. freeze_observers_at says when ranges freeze."
        )
    for layer in _worst(network.layers, lambda each: -each.int8_sqnr, -_LOW):
        yield (
            f"Layer {layer.name} in int8 agrees with fake-quant only to {layer.int8_sqnr:.0f} dB: rounding "
            "differences of the layers before it add up there."
        )


def _worst(layers: Iterable[Layer], badness: Callable[[Layer], float], limit: float) -> list[Layer]:
    found = [layer for layer in layers if badness(layer) > limit]
    return sorted(found, key=badness, reverse=True)[:_SHOWN]


def _backend(networks: Iterable[Network], machine: Machine) -> Iterator[str]:
    """Names a backend that suits this machine better."""
    used = {network.recipe["backend"] for network in networks}
    for backend in sorted(used & {"x86", "fbgemm"}):
        if has_vnni(machine):
            yield (
                f"The backend {backend} uses 7 bits for activations, for CPUs without VNNI. This CPU has "
                "VNNI, so use backend='onednn', which uses 8 bits."
            )
    if not has_vnni(machine) and "onednn" in used:
        yield (
            "The backend onednn uses 8 bits for activations. This CPU has no VNNI, so their sums overflow "
            "in OpenVINO, and in ONNX Runtime unless session.x64quantprecision=1 is set. For CPUs like this "
            "one, use backend='x86', which uses 7 bits."
        )
