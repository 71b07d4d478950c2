from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qat_lightning.tasks.data import EpochSampler, ResumableLoader, SeededDataset
from qat_lightning.tasks.data.resumable import seeded


class Noisy(Dataset[Tensor]):
    """Samples are their index plus noise from all three global generators."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError
        noise = torch.rand(()) + random.random() + np.random.random()
        return (index + 0.1 * noise).reshape(1).float()


def make_loader(**options: Any) -> ResumableLoader:
    loader = ResumableLoader(Noisy(), 4, seed=5, **options)
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    return loader


def flat(batches: Any) -> list[list[float]]:
    return [batch.flatten().tolist() for batch in batches]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler, same, other = (EpochSampler(range(50), seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(9)
    first = list(sampler)
    assert first == list(same)
    assert first != list(other)
    assert sorted(index for _, index in first) == list(range(50))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in second] != [index for _, index in first]


def test_ranks_share_the_samples() -> None:
    halves = [EpochSampler(range(50), num_replicas=2, rank=rank) for rank in (0, 1)]
    assert sorted(index for half in halves for _, index in half) == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_loader_resumes_at_the_next_batch(num_workers: int, drop_last: bool) -> None:
    options: dict[str, Any] = {"drop_last": drop_last}
    whole = flat(make_loader(**options))
    assert len(whole) == (5 if drop_last else 6)
    loader = make_loader(num_workers=num_workers, **options)
    running = iter(loader)
    for _ in range(3):
        next(running)
    assert loader.state_dict() == {"epoch": 2, "batches": 3}  # none that a worker prefetched

    resumed = make_loader(num_workers=num_workers, **options)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == {"epoch": 2, "batches": 3}
    assert len(resumed) == len(whole)
    assert flat(resumed) == whole[3:]
    assert flat(resumed) == whole  # only the first pass continues


def test_a_state_of_another_epoch_starts_at_the_beginning() -> None:
    loader = make_loader()
    loader.load_state_dict({"epoch": 1, "batches": 3})
    assert len(list(loader)) == 6
    assert loader.state_dict() == {"epoch": 2, "batches": 6}


def test_skipped_batches_are_not_loaded() -> None:
    loaded = []

    class Spy(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            loaded.append(index)
            return super().__getitem__(index)

    loader = ResumableLoader(Spy(), 4)
    loader.load_state_dict({"epoch": 0, "batches": 5})
    list(loader)
    assert len(loaded) == 3


def test_loading_neither_reads_nor_moves_the_global_generators() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(()).item(), random.random(), np.random.random()

    def reseed(seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    reseed(1)
    expected = draw()
    reseed(1)
    first = flat(make_loader())
    assert draw() == expected
    reseed(2)
    assert flat(make_loader()) == first


def test_seeded_restores_the_generators_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError), seeded(1, 2):
        torch.rand(3, "no device")  # type: ignore[call-overload]
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_dataset_takes_plain_indices_as_epoch_0() -> None:
    dataset = SeededDataset(Noisy(), seed=3)
    assert dataset[7] == dataset[0, 7] != dataset[1, 7]
    assert len(dataset) == 23


class Recorder(LightningModule):
    """Records the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.flatten().tolist())
        return 0 * self.layer(batch).sum()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def train_dataloader(self) -> Any:
        return ResumableLoader(Noisy(), 4, seed=5)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters())


def fit(ckpt_path: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=3, **quiet, **options)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_lightning_resumes_from_every_checkpoint(tmp_path: Path, limit: float, interval: float) -> None:
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    limits: dict[str, Any] = {"limit_train_batches": limit, "val_check_interval": interval}
    whole = fit(callbacks=[steps, ends], **limits)
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == len(whole.seen) + 3
    for checkpoint in checkpoints:
        step = int(checkpoint.stem.split("step=")[1])
        resumed = fit(checkpoint, enable_checkpointing=False, **limits)
        assert resumed.seen == whole.seen[step:], checkpoint


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_takes_lightnings_sampler() -> None:
    seen = fit(overfit_batches=2, enable_checkpointing=False).seen
    assert [[int(value) for value in batch] for batch in seen[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen[:2] == seen[2:4]
