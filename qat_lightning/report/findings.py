"""States in words what stands out in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from qat_lightning.export.executed import in_words
from qat_lightning.report.content import Layer, Machine, Network, Report, Score, Speed
from qat_lightning.report.machine import has_vnni

_LOSS = 6.0
"""Decibels that a layer may lose: half of a signal's precision, a bit."""
_POOR = 25.0
"""Decibels to float below which a layer's loss is worth a word."""
_CLIPPED = 0.01
_LOW = 20.0
"""Decibels below which what was trained is not what runs."""
_POINTS = 0.5
_SLOW = 1.05
_SHOWN = 3
_NOISE = 0.25
"""Spread, as a share of the median, from which a speed says little."""


def findings(report: Report, float_operations: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Returns the findings of a report.

    Args:
        report: Everything but its findings.
        float_operations: For each runtime the operations, by kind, that it runs in float between int8 ones.

    Returns:
        Sentences, the most important first. Empty where nothing stands out.
    """
    return (
        *_accuracy(report.scores),
        *_speed(report, float_operations),
        *(sentence for network in report.networks for sentence in _layers(network)),
        *_backend(report.networks, report.machine),
    )


def _accuracy(scores: Iterable[Score]) -> Iterator[str]:
    """Compares each int8 file with float, by the metrics that are accuracies."""
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
    """Says where int8 is not faster, and why if that is known."""
    slow: dict[str, list[Speed]] = {}
    for speed in report.speeds:
        if speed.speedup is not None and speed.speedup < _SLOW:
            slow.setdefault(speed.runtime, []).append(speed)
    for runtime, found in slow.items():
        batches = ", ".join(str(speed.batch) for speed in found)
        ratios = ", ".join(f"{speed.speedup:.2f}" for speed in found)
        yield (
            f"In {runtime} int8 is no faster than float (batch {batches}: {ratios} times), "
            f"{_why_slow(report, operations.get(runtime, {}))}."
        )
    noisy = [speed for speed in report.speeds if speed.spread > _NOISE * speed.milliseconds]
    if noisy:
        yield (
            f"{len(noisy)} of {len(report.speeds)} speeds moved by more than {_NOISE:.0%} between calls: "
            "something else used the CPU. Measure them when it is idle."
        )


def _why_slow(report: Report, operations: Mapping[str, int]) -> str:
    if not has_vnni(report.machine):
        return "because this CPU has no int8 dot products (VNNI)"
    if operations:
        return f"because {in_words(Counter(operations))}, and each has to convert there and back"
    floats = sum(len(network.floats) for network in report.networks)
    if floats:
        return f"because {floats} layers or operations stay float, and each has to convert there and back"
    return "probably because starting each operation takes longer than computing so little"


def _layers(network: Network) -> Iterator[str]:
    """Names the layers that lose most, that clip, and whose int8 outputs differ from fake-quant."""
    poor = [layer for layer in network.layers if layer.fake_quant_sqnr < _POOR]
    for layer in _worst(poor, lambda each: each.loss, _LOSS):
        yield (
            f"Layer {layer.name} loses {layer.loss:.0f} dB against what it reads: if accuracy matters, keep "
            f"it float (keep_float=[{layer.name!r}])."
        )
    for layer in _worst(network.layers, lambda each: each.clipped, _CLIPPED):
        yield (
            f"Layer {layer.name} clips {layer.clipped:.1%} of its outputs: its range was frozen before it "
            "settled, or its outliers are rare; freeze_observers_at says when ranges freeze."
        )
    for layer in _worst(network.layers, lambda each: -each.int8_sqnr, -_LOW):
        yield (
            f"Layer {layer.name} in int8 is only within {layer.int8_sqnr:.0f} dB of what was trained: "
            "rounding differences of the layers before it add up there."
        )


def _worst(layers: Iterable[Layer], badness: Callable[[Layer], float], limit: float) -> list[Layer]:
    found = [layer for layer in layers if badness(layer) > limit]
    return sorted(found, key=badness, reverse=True)[:_SHOWN]


def _backend(networks: Iterable[Network], machine: Machine) -> Iterator[str]:
    """Names a backend that is more accurate on this machine."""
    used = {network.recipe["backend"] for network in networks}
    for backend in sorted(used & {"x86", "fbgemm"}):
        if has_vnni(machine):
            yield (
                f"The backend {backend} uses 7 bits for activations, for CPUs without VNNI. This CPU has it: "
                "backend='onednn' uses 8 bits."
            )
    if not has_vnni(machine) and "onednn" in used:
        yield (
            "The backend onednn uses 8 bits for activations, of which sums overflow on this CPU, which has "
            "no VNNI: in OpenVINO, and in ONNX Runtime unless session.x64quantprecision=1 is set. For CPUs "
            "like this backend='x86' uses 7 bits."
        )
