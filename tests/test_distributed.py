"""What a distributed run ends with, and that an error on one rank ends it on all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, multiprocessing, nn
from torchvision import models

from qat_lightning import QuantizationAwareTraining, RankError, convert, load_int8, prepare, save_int8
from qat_lightning.fake_quant.phases import freeze_bn_statistics
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.run.distributed.merge_ranges import merge_ranges
from qat_lightning.run.distributed.processes import fail_together
from qat_lightning.run.distributed.qparams_check import check_same_qparams
from tests.networks import CLASSES, Residual, Stubbed, images, same_state, train_steps
from tests.processes import run_all
from tests.runs import TinyModule, trainer
from tests.test_ranks import INPUT

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two ranks wrote of each scenario."""
    folder = tmp_path_factory.mktemp("distributed")
    run_all([(["-m", "tests.distributed_script", str(folder)], {})], folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


# Runs that end well


@pytest.mark.parametrize(
    "name",
    [
        *("uneven", "static_graph", "half_unseen", "histograms", "own_folders", "own_disks", "torchvision"),
        "captured",
    ],
)
def test_all_ranks_end_with_one_grid_and_one_int8_network(results: Results, name: str) -> None:
    ours, theirs = (rank[name] for rank in results)
    assert "error" not in ours, ours
    for what in ("ranges", "weights"):
        assert len(ours[what]) >= 6
        assert ours[what].keys() == theirs[what].keys()
        assert [key for key, value in ours[what].items() if not torch.equal(value, theirs[what][key])] == []
    assert torch.equal(ours["int8"], theirs["int8"])
    assert ours["int8"].std() > 0


def test_what_one_rank_alone_saw_is_in_the_grid(results: Results) -> None:
    for name in ("uneven", "static_graph"):  # rank 1's images are ten times as bright
        assert 10 < results[0][name]["ranges"][f"model.{INPUT}.max_val"].item() < 30
    unseen = results[1]["half_unseen"]["ranges"][f"side.{INPUT}.max_val"].item()
    assert 1 < unseen < 4.5


def test_each_rank_says_which_file_exists_for_it(results: Results) -> None:
    first, second = (Path(rank["own_folders"]["path"]) for rank in results)
    assert first == Path("out/int8.pt")
    assert second.is_absolute()
    assert second.parts[-3:] == ("machine0", "out", "int8.pt")
    assert [path.name for path in second.parent.parent.parent.rglob("int8.pt")] == ["int8.pt"]
    assert Path(results[0]["own_disks"]["path"]).is_file()
    assert results[1]["own_disks"]["path"] is None


# Runs that end with an error


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("switched_off", "RankMismatchError", "'model.stem.0.weight_fake_quant' is not the same"),
        ("switched_off", "RankMismatchError", r"fake_quant_enabled is [1] on rank 0 and [0] on rank 1"),
        ("fewer_levels", "RankMismatchError", "'model.stem.0.weight_fake_quant' is not the same"),
        ("one_bit", "RankMismatchError", "'model.block.0.weight_fake_quant' is not the same"),
        ("one_bit", "RankMismatchError", "its scale[3] is 0.00"),
        ("disk_full", "ConversionError", "No space left on device (OSError). The trained weights are safe"),
        ("synchronized_on_the_cpu", "MisconfigurationException", "SyncBatchNorm does not accept CPU tensors"),
    ],
)
def test_all_ranks_end_with_the_same_error(results: Results, name: str, error: str, message: str) -> None:
    assert results[0][name] == results[1][name]
    assert results[0][name]["error"] == error
    assert message in results[0][name]["message"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("rank_1_cannot_prepare", "ValueError", "keep_float has 'stems'"),
        ("rank_1_cannot_take_over", "MemoryError", "out of memory"),
        ("nan_on_rank_1", "FloatingPointError", "A NaN or an infinity appeared in the weight of 'stem.0'"),
    ],
)
def test_an_error_of_rank_1_is_told_to_rank_0(results: Results, name: str, error: str, message: str) -> None:
    ours, theirs = (rank[name] for rank in results)
    assert theirs["error"] == error
    assert message in theirs["message"]
    assert ours["error"] == "RankError"
    assert ours["message"].startswith("Rank 1 failed while ")
    assert ours["message"].endswith(f"{error}: {theirs['message']}")


def test_one_process_alone_raises_its_own_error() -> None:
    with pytest.raises(KeyError, match="mine"), fail_together("trying"):
        raise KeyError("mine")
    assert not issubclass(KeyError, RankError)


# Strategies that hand weights back to a parent


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp_fork",
        "ddp_notebook",
        "ddp_fork_find_unused_parameters_true",
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_strategies_without_a_script_are_refused(tmp_path: Path, strategy: str) -> None:
    chosen: Any = strategy
    if strategy == "forkserver":
        chosen = DDPStrategy(start_method="forkserver", process_group_backend="gloo")
    module = Counted(tmp_path)
    runner = trainer(tmp_path, QuantizationAwareTraining(), strategy=chosen, devices=2, max_epochs=1)
    message = r"MisconfigurationException: The strategy starts its processes by .* Use strategy='ddp'"
    with pytest.raises(multiprocessing.ProcessRaisedException, match=message):  # type: ignore[attr-defined]
        runner.fit(module)
    assert list(tmp_path.glob("trained*")) == []
    assert multiprocessing.active_children() == []  # type: ignore[attr-defined]


class Counted(TinyModule):
    """Leaves a file where a training step was done."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (self.folder / f"trained{self.global_rank}").touch()
        return super().training_step(batch, batch_idx)


# Synchronized batch-norm


class Norms(nn.Module):
    """Batch-norms of two and of one dimension, fused and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 1)
        self.middle = nn.BatchNorm2d(8)
        self.last = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.stem(self.first(x))))
        return self.fc(self.last(self.middle(x).mean((2, 3))))


def kinds(module: nn.Module) -> list[str]:
    return [f"{type(each).__module__}.{type(each).__qualname__}" for each in module.modules()]


def synchronized(prepared: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(prepared))


@pytest.mark.parametrize(
    "build", [Norms, Residual, Stubbed, pytest.param(models.resnet18, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_synchronized_batch_norm_inside_fused_modules(
    tmp_path: Path, build: Callable[[], nn.Module], frozen: bool
) -> None:
    """One process has nobody to synchronize with, so that all has to be the same, bit for bit."""
    plain = prepare(build())
    sync = synchronized(plain)
    fused: list[Any] = [module for module in sync.modules() if isinstance(module, FusedConvBn)]
    assert fused
    assert all(type(module.bn) is nn.SyncBatchNorm for module in fused)
    assert sync.state_dict().keys() == plain.state_dict().keys()
    x = images()
    for network in (plain, sync):
        torch.manual_seed(0)
        train_steps(network, ((x,), {}), steps=2)
        network.train()
        freeze_bn_statistics(network, frozen=frozen)
        means = [module.bn.running_mean.clone() for module in fused] if network is sync else []
        with torch.no_grad():
            network(x * 2)
        for module, mean in zip(fused, means, strict=False):
            assert torch.equal(module.bn.running_mean, mean) == frozen
        network.eval()
    assert same_state(plain, sync) == []
    reverted = TorchSyncBatchNorm().revert(copy.deepcopy(sync))
    int8, *others = (convert(network) for network in (plain, sync, reverted))
    for other in others:
        assert [type(m).__qualname__ for m in other.modules()] == [
            type(m).__qualname__ for m in int8.modules()
        ]
        assert torch.equal(other(x), int8(x))
    loaded = load_int8(save_int8(others[0], tmp_path / "int8.pt"), build())
    assert torch.equal(loaded(x), int8(x))


def test_batch_norm_outside_the_networks_leaves_the_other_processes_alone() -> None:
    module = nn.ModuleDict({"network": prepare(Residual()), "norm": nn.BatchNorm2d(CLASSES)})
    train_steps(module["network"], ((images(),), {}))
    int8 = convert(synchronized(module))
    assert not any(isinstance(each, nn.SyncBatchNorm) for each in int8.modules())
    x = torch.randn(2, CLASSES, 3, 3)
    assert torch.equal(int8["norm"](x), module["norm"].eval()(x))  # type: ignore[index]


def _synchronize(rank: int, folder: str) -> None:
    """Two processes share the GPU, and talk through gloo."""
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    prepared = nn.SyncBatchNorm.convert_sync_batchnorm(prepare(Norms())).cuda().train()
    network = nn.parallel.DistributedDataParallel(prepared, device_ids=[0])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        network(images().cuda() * 10**rank).square().mean().backward()
        optimizer.step()
    merge_ranges(prepared)
    check_same_qparams(prepared)
    int8 = convert(prepared)
    torch.manual_seed(0)
    state = {name: value.cpu() for name, value in prepared.state_dict().items()}
    torch.save((state, int8(images())), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.gpu
def test_synchronized_statistics_are_equal_on_all_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(_synchronize, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    (ours, int8), (theirs, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    statistics = [name for name in ours if "running" in name]
    assert len(statistics) == 8
    assert all(torch.equal(ours[name], theirs[name]) for name in statistics)
    assert torch.equal(int8, same)
