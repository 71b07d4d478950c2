"""Rounds before a maximum or minimum instead of after it, for OpenVINO. The result is the same.

OpenVINO fuses the rounding after a ReduceMax or ReduceMin into it. The fused kernel compares in the type of
its result, and is wrong where it reads floats and returns bytes (OpenVINO 2026.4).
"""

from __future__ import annotations

from typing import Any


def round_before_maxima(model: Any) -> None:
    """Moves each such rounding to the input of the maximum, in place.

    Args:
        model: An OpenVINO model, fresh from its converter.
    """
    import openvino.opset13 as ov

    makers = {"ReduceMax": ov.reduce_max, "ReduceMin": ov.reduce_min}
    for rounding in model.get_ordered_ops():
        if rounding.get_type_name() != "FakeQuantize":
            continue
        found, *limits = rounding.input_values()
        reduced = found.get_node()
        make = makers.get(reduced.get_type_name())
        if make is None or any(size != 1 for limit in limits for size in limit.get_shape()):
            continue
        source, axes = reduced.input_values()
        rounded = ov.fake_quantize(source, *limits, rounding.get_attributes()["levels"])
        moved = make(rounded, axes, reduced.get_attributes()["keep_dims"])
        for reader in rounding.output(0).get_target_inputs():
            reader.replace_source_output(moved.output(0))
