"""Records the functions that make tensors or numbers of proxies, and that torch does not dispatch on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qat_lightning.modes.capture.proxies import proxies_in, values_of
from qat_lightning.modes.trace.one_thread import replaced

_RANDOM = ("rand", "randn", "randint", "randperm")
_MAKERS = (
    "arange", "zeros", "ones", "full", "empty", "tensor", "linspace", "logspace", "eye", "meshgrid", "stack",
    "cat", "concat", "where", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like",
    "as_tensor", "scalar_tensor", "tril_indices", "triu_indices", "broadcast_shapes",
)  # fmt: skip
_FACTS = ("finfo", "iinfo", "is_tensor", "is_floating_point", "is_complex", "result_type", "promote_types")
_MATH = ("ceil", "floor", "sqrt", "log", "log2", "prod", "trunc")
_Wrap = Callable[[Any, Any], Callable[..., Any]]


@contextmanager
def recorded_constructors(tracer: Any) -> Iterator[None]:
    """Makes `tracer` record such functions inside the block, in this thread alone."""
    kinds: tuple[tuple[Any, tuple[str, ...], _Wrap], ...] = (
        (torch, (*_RANDOM, *_MAKERS), _recorded),
        (math, _MATH, _recorded),
        (torch, _FACTS, _answered),
    )
    with ExitStack() as stack:
        for owner, names, wrap in kinds:
            for name in names:
                original = getattr(owner, name)
                stack.enter_context(replaced(owner, name, wrap(tracer, original), original))
        yield


def _recorded(tracer: Any, function: Any) -> Callable[..., Any]:
    """Records the calls with a proxy; those of a function that draws random numbers, all of them."""
    always = function.__name__ in _RANDOM

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.records() and (always or proxies_in((args, kwargs))):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _answered(tracer: Any, function: Any) -> Callable[..., Any]:
    """Answers the calls with a proxy by its value."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (
            function(*values_of(args), **values_of(kwargs)) if tracer.records() else function(*args, **kwargs)
        )

    return call
