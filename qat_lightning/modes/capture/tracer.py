"""Runs a network on an example, and records what it does to tensors as a graph."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.nested import PLAIN, fields_of, is_structure, map_tensors
from qat_lightning.base.torch_internals import BatchNorm, is_script_method, script_module_of
from qat_lightning.modes.capture.aliases import Aliases
from qat_lightning.modes.capture.call import Argument, call_with, run
from qat_lightning.modes.capture.constructors import recorded_constructors
from qat_lightning.modes.capture.isolation import use_running_statistics
from qat_lightning.modes.capture.numbers import flowing_numbers
from qat_lightning.modes.capture.proxies import ValueProxy, values_of
from qat_lightning.modes.capture.state import Attributes, Stored
from qat_lightning.modes.capture.telling import telling_modules
from qat_lightning.modes.graph.guards import check_argument, check_decision, check_tensor
from qat_lightning.modes.graph.lines import current_user_line
from qat_lightning.modes.purity.impure import Impure
from qat_lightning.modes.purity.private_generators import PrivateGenerators
from qat_lightning.modes.purity.writes import draw
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.contexts import watched_contexts
from qat_lightning.modes.trace.network_tracer import NetworkTracer


class CaptureTracer(NetworkTracer):
    """Records the run of a network on an example.

    Args:
        opaque: What it does not look into.
        values_decide: Whether the forward may decide by the values of a tensor.
        numbers_flow: Whether `len()` and `int()` of a size return what flows, and not a plain number.

    Attributes:
        computing: Whether a value is being computed. Nothing is recorded meanwhile.
        stored: What the run computed from its input and stored.
    """

    computing = False

    def __init__(self, opaque: Opaque, *, values_decide: bool, numbers_flow: bool) -> None:
        super().__init__(opaque)
        self._values_decide, self._numbers_flow = values_decide, numbers_flow
        self.stored: list[Stored] = []
        self._aliases = Aliases()
        self._paths: dict[nn.Module, str] = {}
        self._names: dict[int, str] = {}
        self._reads: dict[str, ValueProxy] = {}
        self._decided: set[tuple[fx.Node, str]] = set()

    def capture(self, root: nn.Module, arguments: list[Argument], earlier: Sequence[Stored]) -> fx.Graph:
        """Runs `root`, which is used up, and returns the graph.

        Args:
            root: A copy of the network.
            arguments: The arguments of the example's call.
            earlier: What the run in training mode stored, if this one is in eval mode.

        Raises:
            Impure: The forward keeps state for its next call, or draws random numbers in Python.
        """
        self._begin(root)
        before, random_before = Attributes(root), random_state.capture()
        generators = PrivateGenerators(root)
        with (
            self.this_thread(),
            flowing_numbers(root) if self._numbers_flow else nullcontext(),
            telling_modules(root, self),
            recorded_constructors(self),
            watched_contexts(self),
        ):
            args, kwargs = call_with(arguments, {each.name: self._input(each) for each in arguments})
            result = root.forward(*args, **kwargs)
            self.create_node("output", "output", (self.create_arg(result),), {})
        for module, name in generators.restore():
            raise draw(name, module)
        if not random_state.same_state(random_before, random_state.capture()):
            raise Impure(
                "its forward draws random numbers while it is captured, and a graph would repeat them"
            )
        before.refuse_writes(self.graph)
        self.stored = before.stored()
        use_running_statistics(root)
        before.refuse_dependence(lambda: run(root, arguments), earlier)
        return self.graph

    def _begin(self, root: nn.Module) -> None:
        self.root = root
        self.root_module_name = type(root).__name__
        self._paths = {module: name for name, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {}
        self._names = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}

    def _input(self, argument: Argument) -> ValueProxy:
        """Makes the graph's input for an argument, and the guard of what the capture relies on."""
        default = () if argument.default is inspect.Parameter.empty else (argument.default,)
        if default and not isinstance(argument.default, PLAIN):
            default = (None,)
        node = self.create_node("placeholder", argument.name, default, {})
        node.target = argument.name
        value = argument.value
        if not argument.flows:
            self.create_node("call_function", check_argument, (node, value, argument.name), {})
        elif isinstance(value, torch.Tensor):
            facts = (value.ndim, value.is_floating_point())
            self.create_node("call_function", check_tensor, (node, facts, argument.name), {})
        return self._proxy(node, map_tensors(value, torch.clone))  # the forward may write into it

    def records(self) -> bool:
        """Whether the calling code is the forward, and not what computes a value for it."""
        return super().records() and not self.computing

    # Modules.

    def read(self, value: Any) -> Any:
        """Returns the proxy of a parameter or a buffer that a forward reads, and any other value as it is."""
        if type(value) is ValueProxy or not isinstance(value, torch.Tensor) or id(value) not in self._names:
            return value
        name = self._names[id(value)]
        if name not in self._reads:
            self._reads[name] = self._proxy(self.create_node("get_attr", name, (), {}), value)
        return self._reads[name]

    def path_of_module(self, mod: nn.Module) -> str:
        return self._paths[mod]

    # Operations.

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """Computes an operation on the values, records it, and returns its result."""
        if is_script_method(target):
            kind, target, args = "call_module", script_module_of(self.root, target), args[1:]
        arguments = self.create_arg(args), self.create_arg(kwargs)
        value = self._compute(kind, target, values_of(args), values_of(kwargs))
        node = self.create_node(kind, target, *arguments)
        if kind == "call_method" and target.endswith("_") and not target.endswith("__"):
            self._aliases.written(arguments[0][0], args[0].__dict__["value"])
        if (
            value is None
            or isinstance(value, str)
            or (callable(value) and not isinstance(value, torch.Tensor | type))
        ):
            return value
        return self._proxy(node, value)

    def _proxy(self, node: fx.Node, value: Any) -> ValueProxy:
        node.meta["tensor"] = isinstance(value, torch.Tensor)
        node.meta["floating"] = isinstance(value, torch.Tensor) and value.is_floating_point()
        if isinstance(value, PLAIN) or (isinstance(value, torch.Tensor) and not node.meta["floating"]):
            node.meta["no_grad"] = False  # nothing to detach
        self._aliases.made(node, value)
        return ValueProxy(node, self, value)

    def _compute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        before, self.computing = self.computing, True
        random = torch.get_rng_state()
        try:
            with torch.no_grad():
                if kind == "call_module":
                    return _call_layer(self.root.get_submodule(target), args, kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        finally:
            self.computing = before
            torch.set_rng_state(random)

    def assign_item(self, proxy: ValueProxy, key: Any, value: Any) -> None:
        """Records `proxy[key] = value` as a new tensor, which takes the place of the old one."""
        self._aliases.settle(proxy.__dict__["node"], self.create_arg(key), self.create_arg(value))
        self.replace(proxy, self.create_proxy("call_function", set_item, (proxy, key, value), {}))

    def replace(self, proxy: ValueProxy, new: ValueProxy) -> ValueProxy:
        """Makes `proxy`, whose tensor is written to, stand for `new`."""
        self._aliases.written(proxy.__dict__["node"], proxy.__dict__["value"])
        self._aliases.wrote(proxy.__dict__["node"], new.__dict__["node"])
        proxy.__dict__.update(node=new.__dict__["node"], value=new.__dict__["value"])
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Returns `a` as the argument of a node; what is in a proxy's value plays no part."""
        if type(a) is ValueProxy:
            self._aliases.check(a.__dict__["node"])
            return a.__dict__["node"]
        if isinstance(a, fx.Node):
            return a
        if type(a) in (tuple, torch.Size):
            return tuple(self.create_arg(each) for each in a)
        if type(a) is list:
            return [self.create_arg(each) for each in a]
        if type(a) is slice:
            return slice(*(self.create_arg(each) for each in (a.start, a.stop, a.step)))
        if is_structure(a):
            return self._structure(a)
        if isinstance(a, dict):
            return {key: self.create_arg(each) for key, each in a.items()}
        if isinstance(a, nn.Parameter) and id(a) not in self._names:
            raise TypeError(
                "its forward makes a layer, or a parameter, anew at every call. Make it once, in __init__"
            )
        return super().create_arg(a)

    def _structure(self, value: Any) -> fx.Node:
        """Records that a dataclass, such as a ModelOutput, is made of its fields."""
        given = {name: each for name, each in fields_of(value).items() if each is not None}
        return self.create_node("call_function", type(value), (), self.create_arg(given))

    def decide(self, proxy: ValueProxy, value: Any) -> Any:
        """Records the guard of a decision by `proxy`, and returns what it was."""
        node = proxy.__dict__["node"]
        if not self._values_decide and _tells_values(node, proxy.__dict__["value"]):
            raise TypeError(
                "its path depends on the values of a tensor, which differ from batch to batch. If they "
                "always decide alike, prepare the network yourself, with an example (example_inputs=…)"
            )
        key = node, repr(value)
        if not self.computing and key not in self._decided:
            self._decided.add(key)
            self.create_node("call_function", check_decision, (node, value, current_user_line()), {})
        return value


def _tells_values(node: fx.Node, value: Any) -> bool:
    """Whether the value of a node depends on the values of a tensor, and not only on sizes."""
    if isinstance(value, torch.Tensor):
        return True
    numbers = [each for each in node.all_input_nodes if not each.meta["tensor"]]
    return node.target in ("item", "tolist") or any(_tells_values(each, None) for each in numbers)


def set_item(x: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """Returns a copy of `x` whose items `key` are `value`."""
    changed = x.clone()
    changed[key] = value
    return changed


def _call_layer(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Calls a layer. A batch-norm uses its running statistics, which an example of one sample does have."""
    if not isinstance(layer, BatchNorm) or layer.running_mean is None:
        return layer(*args, **kwargs)
    training = layer.training
    layer.training = False
    try:
        return layer(*args, **kwargs)
    finally:
        layer.training = training
