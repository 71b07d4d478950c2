"""Private names of torch, Lightning, Hydra: each is still there and means what it meant.

A failure names what a new version has changed; so does the import of a module that cannot be imported any
more. Everything else in the package uses public names only.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import lightning.pytorch as pl
import pytest
import torch
from hydra._internal.utils import get_args_parser
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.compile import from_compiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import fx, nn
from torch.ao.nn.quantized import reference
from torch.utils import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric

from qat_lightning.base import lightning_internals, torch_internals
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.cli import hydra_internals
from qat_lightning.modes.native import torch_ao_internals
from tests.networks import CLASSES, SIZE, ConvBnRelu, Residual
from tests.runs import TinyModule, dataset, trainer

PACKAGE = Path(__file__).parents[1] / "qat_lightning"
ROOMS = [
    PACKAGE / "base" / "torch_internals.py",
    PACKAGE / "base" / "lightning_internals.py",
    PACKAGE / "cli" / "hydra_internals.py",
    PACKAGE / "modes" / "native" / "torch_ao_internals.py",
]


@contextmanager
def internal(name: str) -> Iterator[None]:
    """Fails with the name that a new version has taken away, or given another meaning."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{name} is gone, or is not what it was: {error!r}")


def test_a_failure_names_the_internal() -> None:
    module: Any = nn.Linear(1, 1)
    with pytest.raises(pytest.fail.Exception, match="torch: _gone is gone"), internal("torch: _gone"):
        module._gone()
    with pytest.raises(pytest.fail.Exception, match="torch: _other is gone"), internal("torch: _other"):
        assert module.bias is None


# torch


def test_what_a_module_holds() -> None:
    network = ConvBnRelu()
    network.register_buffer("kept", torch.zeros(1))
    network.register_buffer("lost", torch.zeros(1), persistent=False)
    with internal("torch: nn.Module._modules"):
        held = torch_internals.modules_of(network)
        assert list(held) == ["conv", "bn", "relu"]
        held["relu"] = nn.Identity()
        assert isinstance(network.relu, nn.Identity)
    with internal("torch: nn.Module._parameters"):
        assert list(torch_internals.parameters_of(network.bn)) == ["weight", "bias"]
    with internal("torch: nn.Module._buffers"):
        assert list(torch_internals.buffers_of(network)) == ["kept", "lost"]
    with internal("torch: nn.Module._non_persistent_buffers_set"):
        assert torch_internals.is_persistent(network, "kept")
        assert not torch_internals.is_persistent(network, "lost")
    network.register_forward_hook(lambda *_: None)
    network.named = {"of": "the user"}  # type: ignore[assignment]
    with internal("torch: the dicts of nn.Module"):
        registries = torch_internals.own_registries(network)
        for own in (held, torch_internals.buffers_of(network), torch_internals.forward_hooks(network)):
            assert any(own is each for each in registries.values())
        assert "named" not in registries


def test_views() -> None:
    tensor = torch.zeros(2, 3)
    with internal("torch: Tensor._is_view"):
        assert torch_internals.is_view(tensor.view(6))
        assert not torch_internals.is_view(tensor)


def test_hooks() -> None:
    module = nn.Linear(2, 2)

    def hook(*_: Any) -> None: ...

    with internal("torch: nn.Module._forward_hooks"):
        handle = module.register_forward_hook(hook)
        assert list(torch_internals.forward_hooks(module).values()) == [hook]
        assert torch_internals.all_forward_hooks(module)
        handle.remove()
    with internal("torch: nn.Module._forward_pre_hooks"):
        assert not torch_internals.all_forward_hooks(module)
        module.register_forward_pre_hook(hook)
        assert torch_internals.all_forward_hooks(module)
    with internal("torch: nn.Module._state_dict_hooks"):
        assert not torch_internals.saves_with(module, hook)
        module.register_state_dict_post_hook(hook)
        assert torch_internals.saves_with(module, hook)
    with internal("torch: nn.Module._load_state_dict_pre_hooks"):
        module.register_load_state_dict_pre_hook(hook)
        assert torch_internals.load_hooks(module) == [hook]


def test_compiled_modules() -> None:
    module = nn.Linear(2, 2)
    compiled: Any = torch.compile(module)
    with internal("torch: nn.Module._compiled_call_impl"):
        assert not torch_internals.is_compiled(module)
        module.compile(backend="eager")
        assert torch_internals.is_compiled(module)
    with internal("torch: the class OptimizedModule that torch.compile returns"):
        assert torch_internals.is_compiled(compiled)


def test_what_ddp_ignores() -> None:
    network = ConvBnRelu()
    torch_internals.ignore_in_ddp(network, ["bn.running_mean"])
    torch_internals.ignore_in_ddp(network, ["bn.running_var"])
    with internal("torch: the attribute _ddp_params_and_buffers_to_ignore of a module in DDP"):
        attribute = "_ddp_params_and_buffers_to_ignore"
        assert getattr(network, attribute) == ["bn.running_mean", "bn.running_var"]
        assert attribute in Path(torch.nn.parallel.distributed.__file__).read_text()


def test_versions_in_a_state_dict() -> None:
    network = ConvBnRelu()
    with internal("torch: _metadata of a state dict"):
        state = network.state_dict()
        assert torch_internals.module_versions(state)["bn"] == {"version": 2}
        old: Any = OrderedDict((name, value) for name, value in state.items() if "num_batches" not in name)
        torch_internals.set_module_versions(old, {"bn": {"version": 1}})
        network.load_state_dict(old)  # version 1 had no num_batches_tracked


def test_names_in_graphs() -> None:
    class Asserts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._assert(x.ndim == 2, "two dimensions")
            return x + torch.ones(3)

    graph_module = fx.symbolic_trace(Asserts())
    with internal("torch: _assert in a graph"):
        assert torch_internals.ASSERT in [node.target for node in graph_module.graph.nodes]
    with internal("torch: fx's name _tensor_constant0"):
        constants = [node.target for node in graph_module.graph.nodes if node.op == "get_attr"]
        assert list(map(torch_internals.is_traced_constant, constants)) == [True]
        assert not torch_internals.is_traced_constant("weight")
    with internal("torch: fx's _USER_PRESERVED_ATTRIBUTES_KEY"):
        torch_internals.preserved_attributes(graph_module)["note"] = "kept"
        assert copy.deepcopy(graph_module).note == "kept"


def test_operators() -> None:
    seen: list[tuple[Any, Any, Any]] = []

    class Watch(torch_internals.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            seen.append((func, torch_internals.written(func, args, kwargs), args))
            return func(*args, **kwargs)

    x, y = torch.zeros(2), torch.zeros(2)
    with internal("torch: TorchDispatchMode"), Watch():
        x.add_(1)
        torch.add(x, 1, out=y)
        torch._foreach_add_([x, y], 1)
        x.uniform_()
        torch.mul(x, 2)
    with internal("torch: OpOverload._schema"):
        written = [{id(tensor) for tensor in each} for _, each, _ in seen]
        assert written == [{id(x)}, {id(y)}, {id(x), id(y)}, {id(x)}, set()]


def test_a_generator_has_a_number() -> None:
    mine, seen = torch.Generator(), []

    class Watch(torch_internals.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(kwargs["generator"])
            return func(*args, **kwargs)

    with Watch():
        torch.rand(2, generator=mine)
    with internal("torch: Generator._cdata"):
        assert torch_internals.number_of(seen[0]) == torch_internals.number_of(mine)
        assert torch_internals.number_of(mine) != torch_internals.number_of(torch.Generator())


def test_tensors_that_share_memory() -> None:
    x = torch.zeros(4)
    with internal("torch: UntypedStorage._cdata"):
        assert torch_internals.memory_of(x) == torch_internals.memory_of(x[1:].detach()) is not None
        assert torch_internals.memory_of(x) != torch_internals.memory_of(x.clone())
        metas = torch.zeros(2, device="meta"), torch.zeros(2, device="meta")
        assert torch_internals.memory_of(metas[0]) != torch_internals.memory_of(metas[1])
        assert torch_internals.memory_of(x.to_sparse()) is None


def test_a_convolution_with_another_weight() -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(1, 3, 5, 5)
    with internal("torch: nn.Conv2d._conv_forward"):
        assert torch.equal(torch_internals.convolve(layer, x, layer.weight, layer.bias), layer(x))
        other = torch_internals.convolve(layer, x, torch.zeros_like(layer.weight), None)
        assert torch.equal(other, torch.zeros(1, 4, 5, 5))
    up: Any = nn.ConvTranspose2d(3, 4, 3, stride=2)
    with internal("torch: nn.ConvTranspose2d._output_padding"):
        size = (12, 11)
        assert [*torch_internals.output_padding(up, x, size)] == [1, 0]
        found = torch_internals.convolve(up, x, up.weight, up.bias, size)
        assert torch.equal(found, up(x, output_size=size))


def test_a_tensor_of_integers() -> None:
    integers = torch.tensor([0, 7, 255], dtype=torch.uint8)
    with quiet_torch_ao(), internal("torch: _make_per_tensor_quantized_tensor"):
        tensor = torch_internals.quantized_tensor(integers, 0.5, 7)
        assert tensor.dequantize().tolist() == [-3.5, 0.0, 124.0]


def test_blocks_of_a_transformer_layer() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(1, 3, 8)
    mask = torch.full((3, 3), -torch.inf).triu(1)
    with internal("torch: nn.TransformerEncoderLayer._ff_block"):
        fed = layer.linear2(layer.linear1(x).relu())
        assert torch.equal(torch_internals.feed_forward(layer, x), fed)
    with internal("torch: nn.TransformerEncoderLayer._sa_block"):
        attended = torch_internals.self_attention(layer, x, mask, None, is_causal=False)
        assert torch.equal(attended, layer.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_what_attention_calls_on_the_cpu() -> None:
    x = torch.randn(1, 2, 3, 4)
    counted = {torch_internals.attention_on_cpu: lambda *_, **__: 7}
    with internal("torch: _scaled_dot_product_flash_attention_for_cpu"):
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            nn.functional.scaled_dot_product_attention(x, x, x)
        assert counter.get_total_flops() == 7


@pytest.mark.parametrize(
    ("layer", "base", "name"),
    [
        (nn.BatchNorm1d(2), torch_internals.BatchNorm, "_BatchNorm"),
        (nn.Conv2d(1, 1, 1), torch_internals.Convolution, "_ConvNd"),
        (nn.ConvTranspose2d(1, 1, 1), torch_internals.ConvTranspose, "_ConvTransposeNd"),
        (nn.Dropout2d(), torch_internals.Dropout, "_DropoutNd"),
        (nn.AvgPool2d(2), torch_internals.AvgPool, "_AvgPoolNd"),
        (nn.AdaptiveAvgPool2d(2), torch_internals.AdaptiveAvgPool, "_AdaptiveAvgPoolNd"),
    ],
)
def test_base_classes(layer: nn.Module, base: type[nn.Module], name: str) -> None:
    with internal(f"torch: {name}, a base class of {type(layer).__name__}"):
        assert isinstance(layer, base)
        assert not isinstance(nn.Linear(1, 1), base)


def test_what_checkpointing_runs() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    with internal("torch: utils.checkpoint's generators"):
        (name, *_) = reversed(torch_internals.checkpoint_generators())
        with mock.patch.object(checkpoint, name, side_effect=KeyError), pytest.raises(KeyError):
            checkpoint.checkpoint(layer, x, use_reentrant=False)


def test_what_autocast_switches() -> None:
    with internal("torch: autocast._enabled"):
        assert torch_internals.switches_autocast_on(torch.autocast("cpu"))
        assert not torch_internals.switches_autocast_on(torch.autocast("cpu", enabled=False))


def test_memory_of_tensors() -> None:
    x = torch.zeros(3)
    view = x[:2]
    with internal("torch: Tensor._base"):
        assert torch_internals.base_of(view) is x
        assert torch_internals.base_of(x) is x
    with internal("torch: Tensor._version"):
        view.add_(1)
        assert torch_internals.version_of(x) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_methods_of_torchscript() -> None:
    network = nn.Sequential(nn.ReLU(), torch.jit.script(nn.ReLU()))
    with internal("torch: _C.ScriptMethod"):
        assert torch_internals.is_script_method(network[1].forward)
        assert not torch_internals.is_script_method(network[0].forward)
    with internal("torch: ScriptModule._c"):
        assert torch_internals.script_module_of(network, network[1].forward) == "1"


def test_nested_values() -> None:
    value = {"a": (1, [2.5]), "b": 3}
    with internal("torch: utils._pytree"):
        leaves, structure = torch_internals.tree_leaves(value), torch_internals.tree_structure(value)
        assert leaves == [1, 2.5, 3]
        assert torch_internals.tree_unflatten(leaves, structure) == value
        assert torch_internals.treespec_loads(torch_internals.treespec_dumps(structure)) == structure
        assert torch_internals.tree_map(str, value) == {"a": ("1", ["2.5"]), "b": "3"}
        assert torch_internals.tree_map_only(float, str, value) == {"a": (1, ["2.5"]), "b": 3}
        way, leaf = torch_internals.tree_flatten_with_path(value)[0][-1]
        assert (way, leaf) == ((torch_internals.MappingKey("b"),), 3)


def test_a_class_of_nested_values() -> None:
    class Kind(dict[str, int]):
        pass

    with internal("torch: utils._pytree"):
        torch_internals.register_mapping(
            Kind,
            "tests.Kind",
            lambda each: [*each],
            lambda values, names: Kind(zip(names, values, strict=True)),
        )
        structure = torch_internals.tree_structure(Kind(a=1, b=2))
        again = torch_internals.treespec_loads(torch_internals.treespec_dumps(structure))
        found = torch_internals.tree_unflatten([3, 4], again)
        assert (type(found), found) == (Kind, {"a": 3, "b": 4})
        assert torch_internals.tree_flatten_with_path(found)[0][-1] == ((torch_internals.MappingKey("b"),), 4)


# torch.ao


def test_fused_modules() -> None:
    with internal("torch.ao: nn.intrinsic._FusedModule"):
        assert issubclass(torch.ao.nn.intrinsic.ConvBnReLU2d, torch_ao_internals.FusedModule)


def test_int8_layers() -> None:
    with quiet_torch_ao(), internal("torch.ao: nn.quantized.Linear._weight_bias"):
        weight, bias = torch_ao_internals.unpacked(torch.ao.nn.quantized.Linear(2, 3))
        assert weight.shape == (3, 2)
        assert bias is not None
        assert bias.shape == (3,)


def test_kernels() -> None:
    class Qdq(nn.Module):
        scale: torch.Tensor
        zero_point: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            weight = {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8, "scale": 1, "zero_point": 0}
            self.layer = reference.Linear.from_float(nn.Linear(2, 2), weight)
            self.register_buffer("scale", torch.tensor(0.1))
            self.register_buffer("zero_point", torch.tensor(0))

        def rounded(self, x: torch.Tensor) -> torch.Tensor:
            return torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8).dequantize()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rounded(self.layer(self.rounded(x)))

    with quiet_torch_ao(), internal("torch.ao: quantization.fx._lower_to_native_backend"):
        int8 = torch_ao_internals.lower_to_kernels(fx.symbolic_trace(Qdq()), {})
        assert type(int8.layer) is torch.ao.nn.quantized.Linear


# Lightning


class Counted(DataLoader[Any]):
    """Counts the iterators that are made over it."""

    iterators = 0

    def __iter__(self) -> Any:
        self.iterators += 1
        return super().__iter__()


class TouchesData(pl.Callback):
    """Asks a run for its data, and for another iterator over it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with internal("lightning: fit_loop.epoch_loop.val_loop._data_source"):
            source = lightning_internals.validation_source(trainer)
            assert source.is_defined()
            assert len(source.dataloader()) == 2
        with internal("lightning: fit_loop._data_source"):
            assert lightning_internals.training_source(trainer).is_defined()
        with internal("lightning: validate_loop._data_source"):
            assert hasattr(lightning_internals.calibration_source(trainer), "dataloader")
        loader: Any = trainer.train_dataloader
        before = loader.iterators
        with internal("lightning: fit_loop._data_fetcher"):
            assert lightning_internals.has_begun_epoch(trainer)
            lightning_internals.renew_iterator(trainer)
            assert loader.iterators == before + 1


def test_the_data_of_a_run(tmp_path: Path) -> None:
    runner = trainer(tmp_path, TouchesData(), max_epochs=1, limit_train_batches=1)
    with internal("lightning: fit_loop._data_fetcher"):
        assert not lightning_internals.has_begun_epoch(runner)
        assert not lightning_internals.validates_now(runner)
    runner.fit(TinyModule(), Counted(dataset(), batch_size=8))


class Asking(pl.Callback):
    """Asks a run about itself, at every training batch."""

    def __init__(self) -> None:
        self.accumulates: list[bool] = []
        self.validates: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        with internal("lightning: fit_loop._should_accumulate"):
            self.accumulates.append(lightning_internals.accumulates(trainer))
        with internal("lightning: fit_loop.epoch_loop._should_check_val_fx"):
            self.validates.append(lightning_internals.validates_now(trainer))


def test_what_follows_a_batch(tmp_path: Path) -> None:
    asking = Asking()
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_train_batches": 4}
    trainer(tmp_path, asking, **options, val_check_interval=4).fit(TinyModule())
    with internal("lightning: fit_loop._should_accumulate"):
        assert asking.accumulates == [True, False, True, False]
    with internal("lightning: fit_loop.epoch_loop._should_check_val_fx"):
        assert asking.validates == [False, False, False, True]


class SavesMidEpoch(pl.Callback):
    """Writes a checkpoint after the first batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")


class ForgetsRestart(pl.Callback):
    """Makes a run forget that it was resumed."""

    resumed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resumed = trainer.fit_loop.restarting
        with internal("lightning: fit_loop._restarting"):
            lightning_internals.forget_restart(trainer)
            assert not trainer.fit_loop.restarting
            assert trainer.fit_loop.epoch_loop.restarting


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": 1, "enable_checkpointing": False}
    trainer(tmp_path, SavesMidEpoch(), **options).fit(TinyModule())
    forgets = ForgetsRestart()
    trainer(tmp_path, forgets, **options).fit(TinyModule(), ckpt_path=tmp_path / "middle.ckpt")
    assert forgets.resumed


def test_strategies(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    spawning = trainer(tmp_path, devices=2, strategy="ddp_spawn", sync_batchnorm=True)
    with internal("lightning: launcher._start_method"):
        assert lightning_internals.start_method(plain) is None
        assert lightning_internals.start_method(spawning) == "spawn"
    with internal("lightning: strategy._layer_sync"):
        assert not lightning_internals.synchronizes_batch_norm(plain)
        assert lightning_internals.synchronizes_batch_norm(spawning)
    with internal("lightning: Trainer._accelerator_connector"):
        assert lightning_internals.cluster_environment(spawning).world_size() == 2


def test_configure_model(tmp_path: Path) -> None:
    class Late(TinyModule):
        made = False

        def configure_model(self) -> None:
            self.made = True

    class Calls(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            assert not pl_module.made
            with internal("lightning: pytorch.trainer.call._call_configure_model"):
                lightning_internals.configure_model(trainer)
                assert pl_module.made

    trainer(tmp_path, Calls(), max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(Late())


def test_a_copy_of_a_compiled_module_is_its_own() -> None:
    with internal("lightning: LightningModule._compiler_ctx"):
        assert not lightning_internals.is_compiled(TinyModule())
        compiled = from_compiled(torch.compile(TinyModule(), backend="eager"))  # type: ignore[arg-type]
        assert lightning_internals.is_compiled(compiled)
        copied = copy.deepcopy(compiled)
        assert "training_step" in vars(copied)
        lightning_internals.forget_original(copied)
        assert not lightning_internals.is_compiled(copied)
        assert "training_step" not in vars(copied)


class LogsMetric(TinyModule):
    """Logs a metric, which Lightning looks for among the module's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss.update(self(batch[0]).mean())
        self.log("val_loss", self.loss)


class Copies(pl.Callback):
    """Copies the module in the middle of a run; Lightning forgets the metrics at its end."""

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.copied = copy.deepcopy(pl_module)


def test_a_copy_of_a_module_knows_its_own_metrics(tmp_path: Path) -> None:
    copies, quick = Copies(), {"limit_val_batches": 1}
    trainer(tmp_path, copies, **quick).validate(LogsMetric(), verbose=False)
    with internal("lightning: LightningModule._metric_attributes"):
        with pytest.raises(MisconfigurationException, match="Could not find the `LightningModule` attribute"):
            trainer(tmp_path, **quick).validate(copy.deepcopy(copies.copied), verbose=False)
        lightning_internals.forget_original(copies.copied)
        trainer(tmp_path, **quick).validate(copies.copied, verbose=False)


def test_averages(tmp_path: Path) -> None:
    average, quick = EMAWeightAveraging(), {"limit_train_batches": 2, "limit_val_batches": 0}
    with internal("lightning: WeightAveraging._average_model"):
        assert lightning_internals.averaged_model(average) is None
        trainer(tmp_path, average, max_epochs=1, **quick).fit(TinyModule())
        assert isinstance(lightning_internals.averaged_model(average), torch.optim.swa_utils.AveragedModel)


@pytest.mark.parametrize("batch_norms", [False, True])
def test_averaged_batch_norms(batch_norms: bool, tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, swa, **options).fit(TinyModule(Residual() if batch_norms else linear))
    with internal("lightning: StochasticWeightAveraging._model_contains_batch_norm"):
        assert lightning_internals.averages_batch_norms(swa) == batch_norms


def test_a_logger_that_writes_the_graph(tmp_path: Path) -> None:
    with internal("lightning: TensorBoardLogger._log_graph"):
        assert lightning_internals.writes_graph(TensorBoardLogger(tmp_path, log_graph=True))
        assert not lightning_internals.writes_graph(TensorBoardLogger(tmp_path))


# Hydra


def test_a_value_with_its_interpolations() -> None:
    config = OmegaConf.create({"name": "run", "folder": "out/${name}"})
    with internal("omegaconf: DictConfig._get_node and _value"):
        assert hydra_internals.unresolved(config, "folder") == "out/${name}"


def test_help_that_is_written_when_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier Pythons check help as Python 3.14 does, by a made-up check."""
    hydra_main: Any = sys.modules["hydra.main"]
    add_argument = argparse.ArgumentParser.add_argument

    def check_help(self: argparse.ArgumentParser, action: argparse.Action) -> None:
        if action.help and not isinstance(action.help, str):
            raise ValueError("badly formed help string")

    def checked(self: Any, *args: Any, **kwargs: Any) -> argparse.Action:
        action = add_argument(self, *args, **kwargs)
        self._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checked)
    monkeypatch.setattr(hydra_main, "get_args_parser", get_args_parser)
    monkeypatch.setattr(sys, "argv", ["command", "--version"])
    command = hydra.main(version_base="1.3", config_path=None)(lambda cfg: None)
    with pytest.raises(ValueError, match="badly formed help string"):
        command()
    with internal("hydra: main.get_args_parser and argparse: ArgumentParser._check_help"):
        hydra_internals.accept_lazy_help()
        with pytest.raises(SystemExit):
            command()
        assert capsys.readouterr().out.startswith("Hydra ")
        assert argparse.ArgumentParser._check_help is check_help  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="argparse checks help")
def test_hydra_is_left_alone_where_argparse_checks_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    hydra_main: Any = sys.modules["hydra.main"]
    monkeypatch.setattr(hydra_main, "get_args_parser", get_args_parser)
    with internal("hydra: main.get_args_parser"):
        hydra_internals.accept_lazy_help()
        assert hydra_main.get_args_parser is get_args_parser


# Every name has a test, and no other file has one


def public_names(tree: ast.Module) -> set[str]:
    """The functions and constants that a module defines for others."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} - {"torch"}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_every_name_has_a_test(room: Path) -> None:
    here = ast.walk(ast.parse(Path(__file__).read_text()))
    used = {
        node.attr
        for node in here
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == room.stem
    }
    assert public_names(ast.parse(room.read_text())) == used


NAMED_TUPLES = {"_replace", "_asdict", "_fields"}  # public methods
OVERRIDDEN = {"_conv_forward", "_load_from_state_dict", "_check_input_dim"}  # torch calls a subclass's own
OTHERS_OF_OURS = {"_observe"}  # of qat_lightning's layers, called by what looks into them
KEYS = {"_target_"}  # in Hydra's configurations
DOCUMENTED = {"sys._getframe"}
ANY_PRIVATE = re.compile(r"_[A-Za-z]\w*")


def is_private(name: str) -> bool:
    return ANY_PRIVATE.fullmatch(name) is not None


def hidden_names() -> set[str]:
    """The private names of others that the package knows, as attributes, imports and strings."""
    nodes = [node for room in ROOMS for node in ast.walk(ast.parse(room.read_text()))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    return {name for name in names if is_private(name)} - OVERRIDDEN - NAMED_TUPLES


def own_attributes(trees: list[ast.Module]) -> set[str]:
    """What the package's classes define: methods, fields, and what they assign to `self`."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            names |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            fields = [each for each in node.body if isinstance(each, ast.Assign | ast.AnnAssign)]
            names |= {name.id for each in fields for name in ast.walk(each) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names(tree: ast.Module, own: set[str], hidden: set[str]) -> list[str]:
    """The private names of others that a file uses, each with its line."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            known = {*NAMED_TUPLES, *OVERRIDDEN, *KEYS}
            known |= own - hidden if is_self(node.value) else OTHERS_OF_OURS
            names = [] if node.attr in known or ast.unparse(node) in DOCUMENTED else [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("qat_lightning"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value in hidden:
            names = [str(node.value)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            names = [ast.literal_eval(each) for each in node.args[1:2] if isinstance(each, ast.Constant)]
        private = [name for name in names if any(map(is_private, name.split(".")))]
        found += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in private]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch.utils import _pytree",
        "from torch._dynamo import config",
        "torch._assert(x)",
        "torch._mine(x)",
        "trainer.fit_loop._restarting = False",
        "self._modules",
        "self._modules = {}",
        "self._foreign()",
        "super()._sa_block(x)",
        "vars(module)['_buffers']",
        "getattr(module, '_foreign', None)",
        "hasattr(module, '_foreign')",
        "setattr(module, '_foreign', 1)",
    ],
)
def test_a_private_name_of_others_is_found(line: str) -> None:
    assert foreign_names(ast.parse(line), own={"_mine", "_modules"}, hidden=hidden_names())


@pytest.mark.parametrize(
    "line",
    [
        "from qat_lightning.base.sqnr import _power",
        "from __future__ import annotations",
        "self._mine()",
        "phase._replace(observe=True)",
        "super()._load_from_state_dict(state_dict)",
        "sys._getframe(1)",
        "cfg.quantization._target_",
        "self.__class__",
        "name = '_suffix'",
    ],
)
def test_other_names_are_left_alone(line: str) -> None:
    assert not foreign_names(ast.parse(line), own={"_mine"}, hidden=hidden_names())


def test_private_names_of_others_have_one_place() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if path not in ROOMS}
    own, hidden = own_attributes(list(trees.values())), hidden_names()
    uses = {path: foreign_names(tree, own, hidden) for path, tree in trees.items()}
    found = [f"{path.relative_to(PACKAGE)}, {use}" for path, each in uses.items() for use in each]
    assert not found, "private names of other packages:\n" + "\n".join(found)
