"""`sensitivity`: measures what int8 costs in each layer of a network, before training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from qat_lightning.analysis.batches import Batches, Metric, check_metric, count_samples, score
from qat_lightning.analysis.preflight.inventory import count_work, parts
from qat_lightning.analysis.sensitivity_table import LayerSensitivity, Sensitivity, gained
from qat_lightning.analysis.simulation import Simulation, simulate
from qat_lightning.base import random_state
from qat_lightning.base.inputs import Inputs, first_samples
from qat_lightning.base.nested import tensors_in
from qat_lightning.base.sqnr import sqnr
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.layers.layer_fake_quantizes import layer_fake_quantizes
from qat_lightning.quantize.options import ModuleOptions, Settings

_Score = Callable[[], float | None]


def sensitivity(
    module: nn.Module,
    dataloader: Iterable[Any],
    *,
    metric: Metric | None = None,
    higher_is_better: bool = True,
    samples: int = 16,
    batches: int | None = 8,
    calibration_batches: int = 8,
    **options: Unpack[ModuleOptions],
) -> Sensitivity:
    """Measures what int8 costs in each layer: once with only this layer in int8, once with only it in float.

    A layer is measured with two fake-quantizes, of its weight and of its output. `keep_float` keeps the
    second one if an int8 layer reads the output, so both layers may have to stay float for the measured gain.
    :func:`keep_for_target` takes this into account.

    A prepared module uses the ranges that it has observed; those of a float module are calibrated. The
    module, its modes and the random generators do not change.

    Args:
        module: A LightningModule, whose `validation_step` runs, or a network; float, or prepared already.
        dataloader: Batches. A LightningModule gets them in its `validation_step`. For a network they are
            tensors, sequences that begin with the required arguments of its forward, or mappings of
            arguments.
        metric: What to measure beside the outputs: a function of (outputs, batch), or the name of a metric
            that the module's `validation_step` logs.
        higher_is_better: Whether more of the metric is better; False for a loss.
        samples: On how many samples outputs are compared.
        batches: On how many batches the metric is computed; None for all.
        calibration_batches: On how many batches ranges are calibrated.
        **options: How networks are prepared, see :class:`qat_lightning.ModuleOptions`. They have no effect on
            a prepared module.

    Returns:
        The layers, most sensitive first.

    Raises:
        ValueError: The module cannot be prepared, is int8 or calls none of its networks; the metric is not
            logged; a number is out of range.
        TypeError: An argument is of the wrong type.

    Example::

        found = sensitivity(module, datamodule.val_dataloader())
        rich.print(found.table())
    """
    settings = Settings.of(options, "sensitivity")
    check_counts(samples=samples, batches=batches, calibration_batches=calibration_batches)
    if metric is not None:
        check_metric(module, metric)
    with random_state.preserved(), torch.inference_mode(False), torch.no_grad():
        simulation = simulate(module, settings, Batches(dataloader, calibration_batches))
        scored = None if metric is None else Batches(dataloader, batches)

        def score_now() -> float | None:
            return None if metric is None or scored is None else score(simulation.module, metric, scored)

        return measure(simulation, samples, score_now, higher_is_better)


def measure(
    simulation: Simulation,
    samples: int,
    score_now: _Score = lambda: None,
    higher_is_better: bool = True,
) -> Sensitivity:
    """Measures every layer of a simulated module.

    Args:
        simulation: The simulated module. All its fake-quantizes are on afterwards.
        samples: On how many samples outputs are compared.
        score_now: Returns the metric with the fake-quantizes that are on at the call.
        higher_is_better: Whether more of the metric is better.
    """
    layers: list[LayerSensitivity] = []
    int8_sqnr, others_sqnr = {}, {}
    simulation.round_with(())
    float_metric = score_now()
    for name in simulation.networks:
        probe = _Probe(simulation, name, samples)
        int8_sqnr[name] = probe.sqnr(simulation.fake_quants)
        others_sqnr[name] = probe.sqnr(probe.others())
        layers += probe.layers(int8_sqnr[name], score_now)
    simulation.round_with(simulation.fake_quants)
    sign = 1 if higher_is_better else -1

    def rank(each: LayerSensitivity) -> tuple[float, float]:
        return (0.0 if each.alone_metric is None else sign * each.alone_metric, each.alone_sqnr)

    ranked = tuple(sorted(layers, key=rank))
    return Sensitivity(ranked, int8_sqnr, others_sqnr, float_metric, score_now())


def check_counts(**counts: int | None) -> None:
    """Raises a `ValueError` unless each count is at least 1, or None."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, but received {count}.")


class _Probe:
    """Compares one network of a simulated module with its float outputs, on a few samples."""

    def __init__(self, simulation: Simulation, name: str, samples: int) -> None:
        self.simulation, self.name = simulation, name
        self.network = simulation.networks[name]
        self.inputs = list(_limited(simulation.inputs[name], samples))
        simulation.round_with(())
        self.float_outputs = self._outputs()
        if not torch.isfinite(self.float_outputs).all():
            raise ValueError(
                f"The float outputs of {name or type(self.network).__name__!r} hold a NaN or an infinity, so "
                "int8 cannot be compared with them. Pass batches, and weights, that give finite outputs."
            )

    def sqnr(self, fake_quants: Collection[Any]) -> float:
        """Returns the SQNR between the float outputs and those with only these fake-quantizes on."""
        self.simulation.round_with(fake_quants)
        return sqnr(self.float_outputs, self._outputs())

    def others(self) -> frozenset[Any]:
        """Returns the fake-quantizes that belong to no layer."""
        all_of_them = {fake_quant for _, fake_quant in fake_quantizes(self.network)}
        return frozenset(all_of_them.difference(*layer_fake_quantizes(self.network).values()))

    def layers(self, int8_sqnr: float, score_now: _Score) -> Iterator[LayerSensitivity]:
        """Measures each layer that runs on the inputs."""
        self.simulation.round_with(())
        modules = dict(self.network.named_modules())
        with torch.enable_grad():
            work = count_work(self.network, _first(self.inputs[0], 1)).layers
        for name, fake_quants in layer_fake_quantizes(self.network).items():
            if name in work:
                alone, alone_metric = self.sqnr(fake_quants), score_now()
                kept, kept_metric = self.sqnr(self.simulation.fake_quants - fake_quants), score_now()
                yield LayerSensitivity(
                    name,
                    self.name,
                    parts(modules[name]),
                    work[name],
                    alone,
                    kept,
                    gained(kept, int8_sqnr),
                    alone_metric,
                    kept_metric,
                )

    def _outputs(self) -> Tensor:
        """Returns all floating-point outputs in one flat tensor."""
        outputs = [self.network(*inputs.args, **inputs.kwargs) for inputs in self.inputs]
        leaves = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
        return torch.cat([leaf.flatten().float() for leaf in leaves])


def _limited(calls: Sequence[Inputs], samples: int) -> Iterator[Inputs]:
    """Yields the first calls, cut so that together they hold at most this many samples."""
    for call in calls:
        if samples <= 0:
            return
        yield _first(call, samples)
        samples -= count_samples(tuple(call))


def _first(call: Inputs, samples: int) -> Inputs:
    device = next((tensor.device for tensor in tensors_in(call)), torch.device("cpu"))
    return Inputs(*move_data_to_device(first_samples(tuple(call), samples), device))
