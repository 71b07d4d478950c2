"""Records the functions that make tensors or numbers of proxies, and that torch does not dispatch on them."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qat_lightning.modes.capture.proxies import proxies_in, values_of

_RANDOM = frozenset({"rand", "randn", "randint", "randperm"})
_MAKERS = (
    "arange", "zeros", "ones", "full", "empty", "tensor", "linspace", "logspace", "eye", "rand",
    "randn", "randint", "randperm", "meshgrid", "stack", "cat", "concat", "where", "zeros_like",
    "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "as_tensor", "scalar_tensor",
    "tril_indices", "triu_indices", "broadcast_shapes",
)  # fmt: skip
_FACTS = ("finfo", "iinfo", "is_tensor", "is_floating_point", "is_complex", "result_type", "promote_types")
_MATH = ("ceil", "floor", "sqrt", "log", "log2", "prod", "trunc")


@contextmanager
def recorded_constructors(tracer: Any) -> Iterator[None]:
    """Makes `tracer` record such functions inside the block, in this thread alone."""
    thread = threading.get_ident()
    before: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        function = getattr(owner, name, None)
        if function is not None:
            before.append((owner, name, function))
            setattr(owner, name, wrap(function))

    def recording(function: Any, *, always: bool) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if (
                threading.get_ident() != thread
                or tracer.computing
                or not (always or proxies_in((args, kwargs)))
            ):
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return call

    def answering(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or not proxies_in((args, kwargs)):
                return function(*args, **kwargs)
            return function(*values_of(args), **values_of(kwargs))

        return call

    try:
        for name in _MAKERS:
            replace(torch, name, functools.partial(recording, always=name in _RANDOM))
        for name in _MATH:
            replace(math, name, functools.partial(recording, always=False))
        for name in _FACTS:
            replace(torch, name, answering)
        yield
    finally:
        for owner, name, function in reversed(before):
            setattr(owner, name, function)
