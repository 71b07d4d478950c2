"""Private names of torch, Lightning, Hydra: each is still there and means what it meant.

A failure names what a new version has changed. Everything else in the package uses public names only.
"""

from __future__ import annotations

import ast
import copy
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.compile import from_compiled
from omegaconf import OmegaConf
from torch import fx, nn

from qat_lightning.base import lightning_internals, torch_internals
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.torch_internals import (
    TABLES,
    buffers_of,
    convolve,
    forward_hooks,
    has_forward_hooks,
    ignore_in_ddp,
    is_persistent,
    load_hooks,
    module_versions,
    modules_of,
    parameters_of,
    preserved_attributes,
    saves_with,
    set_module_versions,
)
from qat_lightning.cli.hydra_internals import unresolved
from qat_lightning.modes.torch_ao_internals import FusedModule, quantized_decomposed, unpacked
from tests.networks import ConvBnRelu
from tests.runs import TinyModule, trainer

PACKAGE = Path(__file__).parents[1] / "qat_lightning"
ROOMS = {"torch_internals.py", "lightning_internals.py", "hydra_internals.py", "torch_ao_internals.py"}


# torch


def test_what_a_module_holds() -> None:
    network = ConvBnRelu()
    network.register_buffer("kept", torch.zeros(1))
    network.register_buffer("lost", torch.zeros(1), persistent=False)
    assert list(modules_of(network)) == ["conv", "bn", "relu"], "nn.Module._modules"
    assert list(parameters_of(network.bn)) == ["weight", "bias"], "nn.Module._parameters"
    assert list(buffers_of(network)) == ["kept", "lost"], "nn.Module._buffers"
    assert [is_persistent(network, name) for name in ("kept", "lost")] == [True, False], (
        "nn.Module._non_persistent_buffers_set"
    )
    assert set(TABLES) <= set(vars(network)), "the dicts of nn.Module"
    modules_of(network)["relu"] = nn.Identity()
    assert isinstance(network.relu, nn.Identity), (
        "nn.Module._modules is no longer what attributes are read from"
    )


def test_hooks() -> None:
    module = nn.Linear(2, 2)
    assert not has_forward_hooks(module)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert has_forward_hooks(module), "nn.Module._forward_pre_hooks"
    handle.remove()
    module.register_forward_hook(print)
    assert list(forward_hooks(module).values()) == [print], "nn.Module._forward_hooks"

    def hook(*_: Any) -> None: ...

    module.register_state_dict_post_hook(hook)
    module.register_load_state_dict_pre_hook(hook)
    assert saves_with(module, hook), "nn.Module._state_dict_hooks"
    assert load_hooks(module) == [hook], "nn.Module._load_state_dict_pre_hooks"


def test_compiled_modules() -> None:
    module = nn.Linear(2, 2)
    assert not torch_internals.is_compiled(module)
    compiled: Any = torch.compile(module)
    assert torch_internals.is_compiled(compiled), "torch.compile's OptimizedModule"
    module.compile(backend="eager")
    assert torch_internals.is_compiled(module), "nn.Module._compiled_call_impl"


def test_what_ddp_ignores() -> None:
    network = ConvBnRelu()
    ignore_in_ddp(network, ["bn.running_mean"])
    ignore_in_ddp(network, ["bn.running_var"])
    ignored = network._ddp_params_and_buffers_to_ignore
    assert ignored == ["bn.running_mean", "bn.running_var"]
    source = Path(torch.nn.parallel.distributed.__file__).read_text()
    assert "_ddp_params_and_buffers_to_ignore" in source, "the attribute that DistributedDataParallel reads"


def test_versions_in_a_state_dict() -> None:
    state = ConvBnRelu().state_dict()
    assert module_versions(state)["bn"] == {"version": 2}, "_metadata of a state dict"
    other: Any = OrderedDict()
    set_module_versions(other, {"bn": {"version": 1}})
    assert module_versions(other) == {"bn": {"version": 1}}


def test_attributes_of_a_copied_graph() -> None:
    graph_module = fx.symbolic_trace(ConvBnRelu())
    preserved_attributes(graph_module)["note"] = "kept"
    assert copy.deepcopy(graph_module).note == "kept", "fx's _USER_PRESERVED_ATTRIBUTES_KEY"


def test_a_convolution_with_another_weight() -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(1, 3, 5, 5)
    weight = torch.randn_like(layer.weight)
    expected = layer(x)
    assert torch.equal(convolve(layer, x, layer.weight, layer.bias), expected), "nn.Conv2d._conv_forward"
    assert not torch.equal(convolve(layer, x, weight, layer.bias), expected)


def test_base_classes() -> None:
    assert isinstance(nn.BatchNorm1d(2), torch_internals.BatchNorm), "_BatchNorm"
    assert isinstance(nn.ConvTranspose2d(1, 1, 1), torch_internals.ConvTranspose), "_ConvTransposeNd"
    assert isinstance(nn.Dropout2d(), torch_internals.Dropout), "_DropoutNd"
    assert isinstance(nn.AvgPool2d(2), torch_internals.AvgPool), "_AvgPoolNd"
    assert isinstance(nn.AdaptiveAvgPool2d(2), torch_internals.AdaptiveAvgPool), "_AdaptiveAvgPoolNd"
    assert issubclass(torch.ao.nn.intrinsic.ConvBnReLU2d, FusedModule), "torch.ao.nn.intrinsic._FusedModule"


def test_nested_values() -> None:
    value = {"a": (1, [2]), "b": 3}
    leaves, structure = torch_internals.tree_leaves(value), torch_internals.tree_structure(value)
    assert leaves == [1, 2, 3], "torch.utils._pytree"
    assert torch_internals.tree_unflatten(leaves, structure) == value
    assert torch_internals.treespec_loads(torch_internals.treespec_dumps(structure)) == structure


def test_int8_layers_and_operations_of_torch_ao() -> None:
    with quiet_torch_ao():
        layer = torch.ao.nn.quantized.Linear(2, 3)
    weight, bias = unpacked(layer)
    assert weight.shape == (3, 2), "_weight_bias of torch.ao's int8 layers"
    assert bias is not None
    assert quantized_decomposed.quantize_per_tensor(torch.ones(1), 0.5, 3, 0, 255, torch.uint8).item() == 5


# Lightning


class Asking(pl.Callback):
    """Asks everything that can be asked of a run, in its course."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.said["compiled"] = lightning_internals.is_compiled(pl_module)
        self.said["environment"] = lightning_internals.cluster_environment(trainer)
        self.said["synchronizes"] = lightning_internals.synchronizes_batch_norm(trainer)
        self.said["start"] = lightning_internals.start_method(trainer)
        self.said["begun"] = lightning_internals.has_begun_epoch(trainer)
        source = lightning_internals.validation_source(trainer)
        self.said["validation"] = source.is_defined() and source.dataloader() is not None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.said.setdefault("accumulates", []).append(lightning_internals.accumulates(trainer))
        self.said.setdefault("validates", []).append(lightning_internals.validates_now(trainer))
        self.said["step"] = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lightning_internals.forget_restart(trainer)
        self.said["restarting"] = trainer.fit_loop.restarting
        lightning_internals.renew_iterator(trainer)


def test_the_trainer_and_its_loops(tmp_path: Path) -> None:
    asking = Asking()
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_train_batches": 4}
    trainer(tmp_path, asking, **options).fit(TinyModule())
    assert asking.said["environment"].world_size() == 1, "Trainer._accelerator_connector.cluster_environment"
    assert asking.said["accumulates"] == [True, False, True, False], "fit_loop._should_accumulate"
    assert asking.said["validates"] == [False, False, False, True], "epoch_loop._should_check_val_fx"
    assert asking.said["begun"], "fit_loop._data_fetcher"
    assert asking.said["validation"], "val_loop._data_source"
    assert not asking.said["restarting"], "fit_loop._restarting"
    assert not asking.said["compiled"], "LightningModule._compiler_ctx"
    assert (asking.said["synchronizes"], asking.said["start"]) == (False, None)


def test_strategies() -> None:
    runner = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", sync_batchnorm=True, logger=False)
    assert lightning_internals.start_method(runner) == "spawn", "launcher._start_method"
    assert lightning_internals.synchronizes_batch_norm(runner), "strategy._layer_sync"


def test_configure_model(tmp_path: Path) -> None:
    class Late(TinyModule):
        made = False

        def configure_model(self) -> None:
            self.made = True

    class Calls(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            lightning_internals.configure_model(trainer)
            assert pl_module.made, "lightning.pytorch.trainer.call._call_configure_model"

    trainer(tmp_path, Calls(), max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(Late())


def test_a_copy_of_a_module_is_its_own(tmp_path: Path) -> None:
    compiled: Any = torch.compile(TinyModule(), backend="eager")
    inner = from_compiled(compiled)
    assert lightning_internals.is_compiled(inner), "LightningModule._compiler_ctx"
    copied = copy.deepcopy(inner)
    lightning_internals.forget_original(copied)
    assert not lightning_internals.is_compiled(copied)
    assert "training_step" not in vars(copied), "the names in LightningModule._compiler_ctx"
    original: Any = TinyModule()
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1).fit(original)
    copied = copy.deepcopy(original)
    lightning_internals.forget_original(copied)
    assert copied._metric_attributes is None, "LightningModule._metric_attributes"


def test_averages(tmp_path: Path) -> None:
    average, swa = EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    assert lightning_internals.averaged_model(average) is None
    quick: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path / "ema", average, max_epochs=1, **quick).fit(TinyModule())
    assert isinstance(lightning_internals.averaged_model(average), nn.Module), (
        "WeightAveraging._average_model"
    )
    trainer(tmp_path / "swa", swa, max_epochs=2, **quick).fit(TinyModule())
    assert lightning_internals.averages_batch_norms(swa), "SWA's _model_contains_batch_norm"


def test_a_logger_that_writes_the_graph(tmp_path: Path) -> None:
    assert lightning_internals.writes_graph(TensorBoardLogger(tmp_path, log_graph=True)), "_log_graph"
    assert not lightning_internals.writes_graph(TensorBoardLogger(tmp_path))


# Hydra


def test_a_value_with_its_interpolations() -> None:
    config = OmegaConf.create({"name": "run", "folder": "out/${name}"})
    assert unresolved(config, "folder") == "out/${name}", "OmegaConf's _get_node and _value"


# The rest of the package


# A NamedTuple's methods are public; others are overridden, as torch expects, or are Hydra's keys.
PUBLIC = {"_replace", "_asdict", "_fields", "_conv_forward", "_load_from_state_dict", "_assert", "_target_"}
PUBLIC |= {"_getframe"}


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Every name that the package itself defines: attributes, methods, functions, variables."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def read_names(tree: ast.AST) -> set[str]:
    """Names of the attributes that a file reads, and of what it imports of others."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("qat_lightning", "__")):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return names


def test_private_names_of_others_have_one_place() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    known = own_names(trees.values()) | PUBLIC
    for path, tree in trees.items():
        private = {name for name in read_names(tree) if name.startswith("_") and not name.startswith("__")}
        foreign = set() if path.name in ROOMS else private - known
        assert not foreign, f"{path} uses private names of other packages: {sorted(foreign)}"
