"""Proxies that carry the value of an example run, so that a forward decides by the example.

Sizes, lengths, dtypes, `isinstance`, `if`, `for` and `int()` are answered by the value. Operations on
tensors, and on the sizes of tensors, are recorded. What a decision depends on becomes a guard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.overrides import is_tensor_method_or_property

from qat_lightning.base.nested import map_nested
from qat_lightning.base.torch_internals import is_script_method

_PLAIN = frozenset({"ndim", "layout", "is_nested", "is_sparse", "is_quantized", "is_mkldnn", "names"})
"""Attributes of a tensor that an operation never changes for another input: answered by the value."""

_SEQUENCES = (list, tuple, str)


def map_proxies(value: Any, function: Callable[[ValueProxy], Any]) -> Any:
    """Applies `function` to each proxy in a nested `value`."""
    return map_nested(value, lambda each: type(each) is ValueProxy, function)


def values_of(value: Any) -> Any:
    """Replaces each proxy in `value` by what it stands for."""
    return map_proxies(value, lambda proxy: proxy.__dict__["value"])


def proxies_in(value: Any) -> list[ValueProxy]:
    """Returns the proxies in `value`."""
    found: list[ValueProxy] = []

    def keep(proxy: ValueProxy) -> ValueProxy:
        found.append(proxy)
        return proxy

    map_proxies(value, keep)
    return found


class ValueProxy(fx.Proxy):
    """A node of the graph, with the value that it has for the example.

    `type(proxy)` is `ValueProxy`, so torch's functions are recorded. `isinstance` sees the value's type.
    """

    tracer: Any

    if TYPE_CHECKING:

        def __getitem__(self, key: Any) -> Any: ...  # as all operators, from torch.fx

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        super().__init__(node, tracer)
        self.__dict__["value"] = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__dict__["value"])

    def __repr__(self) -> str:
        return repr(self.__dict__["value"])

    def __str__(self) -> str:
        return str(self.__dict__["value"])

    def __format__(self, spec: str) -> str:
        return format(self.__dict__["value"], spec)

    def __hash__(self) -> int:
        return id(self)

    # Decisions.

    def __bool__(self) -> bool:
        return self.tracer.decide(self, bool(self.__dict__["value"]))

    def __int__(self) -> int:
        return self.tracer.decide(self, int(self.__dict__["value"]))

    def __index__(self) -> int:
        return self.tracer.decide(self, operator.index(self.__dict__["value"]))

    def __float__(self) -> float:
        return self.tracer.decide(self, float(self.__dict__["value"]))

    def __len__(self) -> int:
        value = self.__dict__["value"]
        if isinstance(value, torch.Tensor):
            return int(self.size(0))
        return len(value)  # of a tuple, list or dict: part of the structure, which a call keeps

    def __iter__(self) -> Iterator[Any]:
        value = self.__dict__["value"]
        if isinstance(value, dict):
            return iter(list(value))
        return iter([self[i] for i in range(len(self))])

    def __contains__(self, key: Any) -> bool:
        value = self.__dict__["value"]
        if isinstance(value, torch.Tensor):
            return bool((self == key).any())
        return values_of(key) in value

    # Structures.

    def keys(self) -> Any:
        return self.__dict__["value"].keys()

    def values(self) -> Any:
        value = self.__dict__["value"]
        if isinstance(value, torch.Tensor):  # of a sparse one
            return self.tracer.create_proxy("call_method", "values", (self,), {})
        return [self[key] for key in value]

    def items(self) -> Any:
        return [(key, self[key]) for key in self.__dict__["value"]]

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self.__dict__["value"] else default

    def tolist(self) -> Any:
        return self.tracer.decide(self, self.__dict__["value"].tolist())

    def item(self) -> Any:
        return self.tracer.create_proxy("call_method", "item", (self,), {})

    def dim(self) -> int:
        return self.__dict__["value"].dim()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["value"], name)  # raises as the value does
        if name in _PLAIN and isinstance(self.__dict__["value"], torch.Tensor):
            return value
        if callable(value) and not isinstance(value, torch.Tensor | type):
            return _Method(self, name)
        if isinstance(value, bool | str | type(None) | type | torch.nn.Parameter):
            return value
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    # Writes.

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.assign_item(self, key, value)

    def __iadd__(self, other: Any) -> Any:
        return self._written(operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._written(operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._written(operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._written(operator.truediv, other)

    # What fx.Proxy lacks of numbers.

    def __mul__(self, other: Any) -> Any:
        return self.__rmul__(other) if isinstance(other, _SEQUENCES) else super().__mul__(other)  # type: ignore[misc]

    def __rmul__(self, other: Any) -> Any:
        if isinstance(other, _SEQUENCES) and isinstance(self.__dict__["value"], int):
            return other * operator.index(self)  # its length is part of the structure
        return super().__rmul__(other)  # type: ignore[misc]

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def _written(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        new = operation(self, other)
        return self.tracer.replace(self, new) if isinstance(self.__dict__["value"], torch.Tensor) else new

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = proxies_in((args, kwargs))[0].__dict__["tracer"]
        if tracer.computing:
            return function(*values_of(args), **values_of(kwargs or {}))
        if is_script_method(function) or not is_tensor_method_or_property(function):
            return tracer.create_proxy("call_function", function, args, kwargs or {})
        if function.__name__ == "__get__":
            return getattr(args[0], function.__self__.__name__)
        return tracer.create_proxy("call_method", function.__name__, args, kwargs or {})


class _Method:
    """A method of a proxy, recorded when it is called."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.create_proxy("call_method", self.name, (self.owner, *args), kwargs)
