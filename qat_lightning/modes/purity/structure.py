"""Copies the structure of a network: new modules that share every tensor with the originals.

What is done to such a copy, such as adding modules or assigning attributes, does not reach the original. So a
trace, which may be refused halfway, works on a copy.

The copy must not lead back to the original: a function that reads `self.training` of the original would see
the wrong mode. So everything through which an attribute leads to a module of the network is copied, too:
containers, bound methods, partial functions, closures, weak references, and objects of the user's classes.
Everything else is shared.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.Size, type, ModuleType)
_CONTAINERS = (list, dict, OrderedDict, set)
"""Types that are always copied: a forward may add something."""
# Of these packages, only torch.nn's wrappers of hooks lead to modules and are made to be copied.
_SHARED = ("torch.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


def structural_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of `network` with modules of its own and the same parameters and buffers.

    A module that occurs twice also occurs twice in the copy. A TorchScript module stands for itself.
    """
    modules = list(network.modules())
    copier = _Copier(modules)
    for module in modules:
        copier.fill(module)
    twin: nn.Module = copier(network)
    return twin


def held(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yields what the modules of `network` hold, each once, with the module and the name of its attribute.

    This includes what they hold through containers, functions and objects of the user's classes.
    """
    seen: dict[int, Any] = {id(module): module for module in network.modules()}
    for module in network.modules():
        for name, value in _named(module):
            pending = [value]
            while pending:
                each = pending.pop()
                if id(each) not in seen:
                    seen[id(each)] = each
                    yield module, name, each
                    pending += [] if _is_atom(each) else _parts(each)


def _named(module: nn.Module) -> list[tuple[str, Any]]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [*tensors, *vars(module).items()]


class _Copier:
    """Copies the values of attributes, each once."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.leading = _leading_to(modules)
        self.twins: dict[int, Any] = {id(module): _shell(module) for module in modules}

    def __call__(self, value: Any) -> Any:
        """Returns `value` as the copy holds it."""
        if id(value) in self.twins:
            return self.twins[id(value)]
        if not (id(value) in self.leading or type(value) in _CONTAINERS):
            return value
        rebuild = next((each for kind, each in _REBUILDS if isinstance(value, kind)), None)
        twin = rebuild(self, value) if rebuild else self._object(value)
        return self.twins.setdefault(id(value), twin)

    def fill(self, value: Any) -> None:
        """Gives the empty twin of an object its attributes."""
        twin = self.twins[id(value)]
        if twin is not value:
            _attributes(twin).update({name: self(each) for name, each in _attributes(value).items()})
            for name, each in _slots(value).items():
                object.__setattr__(twin, name, self(each))

    def _object(self, value: Any) -> Any:
        self.twins[id(value)] = _shell(value)
        self.fill(value)
        return self.twins[id(value)]

    def _emptied(self, value: Any) -> Any:
        """Returns an empty twin of a container, known before it is filled: it may hold itself."""
        twin = self.twins[id(value)] = copy.copy(value)
        twin.clear()
        return twin

    def of_mapping(self, value: dict[Any, Any]) -> Any:
        twin = self._emptied(value)
        for key, each in value.items():
            twin[self(key)] = self(each)
        return twin

    def of_sequence(self, value: list[Any] | deque[Any]) -> Any:
        twin = self._emptied(value)
        twin.extend(map(self, value))
        return twin

    def of_set(self, value: set[Any]) -> Any:
        twin = self._emptied(value)
        twin.update(map(self, value))
        return twin

    def of_frozenset(self, value: frozenset[Any]) -> Any:
        return frozenset(map(self, value))

    def of_tuple(self, value: tuple[Any, ...]) -> Any:
        return tuple.__new__(type(value), map(self, value))

    def of_partial(self, value: partial[Any]) -> Any:
        return type(value)(self(value.func), *map(self, value.args), **self(value.keywords))

    def of_method(self, value: MethodType) -> Any:
        return MethodType(self(value.__func__), self(value.__self__))

    def of_function(self, value: FunctionType) -> Any:
        cells = value.__closure__ and tuple(map(self, value.__closure__))
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self.twins[id(value)] = twin
        twin.__defaults__, twin.__kwdefaults__ = self(value.__defaults__), self(value.__kwdefaults__)
        twin.__dict__.update({name: self(each) for name, each in vars(value).items()})
        return twin

    def of_cell(self, value: CellType) -> Any:
        twin = self.twins[id(value)] = CellType()
        twin.cell_contents = self(value.cell_contents)  # a cell that leads anywhere is not empty
        return twin

    def of_reference(self, value: weakref.ref[Any]) -> Any:
        return weakref.ref(self(value()))

    def of_proxy(self, value: Any) -> Any:
        return weakref.proxy(self(_behind(value)))


_REBUILDS: list[tuple[Any, Callable[[_Copier, Any], Any]]] = [
    (weakref.ProxyTypes, _Copier.of_proxy),  # first: a proxy claims to be of the class of what it stands for
    (dict, _Copier.of_mapping),
    ((list, deque), _Copier.of_sequence),
    (set, _Copier.of_set),
    (frozenset, _Copier.of_frozenset),
    (tuple, _Copier.of_tuple),
    (partial, _Copier.of_partial),
    (MethodType, _Copier.of_method),
    (FunctionType, _Copier.of_function),
    (CellType, _Copier.of_cell),
    (weakref.ref, _Copier.of_reference),
]


def _leading_to(modules: list[nn.Module]) -> dict[int, Any]:
    """Returns the values, by id, through which an attribute of a module leads to one of the modules."""
    seen: dict[int, Any] = {id(module): module for module in modules}
    holders: dict[int, list[int]] = {}
    pending: list[tuple[int, Any]] = [
        (id(module), each) for module in modules for each in _parts_of_object(module)
    ]
    while pending:
        holder, value = pending.pop()
        if not _is_atom(value):
            holders.setdefault(id(value), []).append(holder)
            if id(value) not in seen:
                seen[id(value)] = value
                pending += [(id(value), part) for part in _parts(value)]
    leading: dict[int, Any] = {}
    found = [id(module) for module in modules]
    while found:
        more = [each for each in holders.pop(found.pop(), ()) if each not in leading]
        leading |= {each: seen[each] for each in more}
        found += more
    return leading


def _parts(value: Any) -> Iterable[Any]:
    """Returns what a value holds, for each kind of value that can be rebuilt with other parts."""
    if type(value) in weakref.ProxyTypes:
        return [_behind(value)]
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    if isinstance(value, CellType):
        return _contents(value)
    if isinstance(value, weakref.ref):
        return [value()]
    return [] if _is_shared(value) else _parts_of_object(value)


def _parts_of_object(value: Any) -> list[Any]:
    return [*_attributes(value).values(), *_slots(value).values()]


def _is_atom(value: Any) -> bool:
    if type(value) in weakref.ProxyTypes:
        return _behind(value) is None
    return isinstance(value, _ATOMS)


def _is_shared(value: Any) -> bool:
    """Whether an object stays what it is: a module outside the network, or one that no copy can replace."""
    packages = [f"{kind.__module__}." for kind in type(value).__mro__]
    foreign = any(each.startswith(_SHARED) and not each.startswith("torch.nn.") for each in packages)
    return isinstance(value, nn.Module) or foreign or hasattr(type(value), "__del__")


def _attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def _slots(value: Any) -> dict[str, Any]:
    """Returns the attributes that `value` keeps in slots."""
    names = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
    return {n: getattr(value, n) for n in names if n not in ("__dict__", "__weakref__") and hasattr(value, n)}


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _behind(proxy: Any) -> Any:
    """Returns the object that a weak proxy stands for, or None after its end."""
    try:
        return proxy.__repr__.__self__  # a proxy passes every attribute on, so this is a method of the object
    except ReferenceError:
        return None


def _shell(value: Any) -> Any:
    """Returns a new object of the same class to fill; a TorchScript module stands for itself."""
    if isinstance(value, torch.jit.ScriptModule):
        return value
    try:
        return object.__new__(type(value))  # a graph module's own `__new__` would make a new class
    except TypeError:  # a class written in C, such as SimpleNamespace
        return copy.copy(value)
