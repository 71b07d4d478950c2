from __future__ import annotations

import os
from collections.abc import Iterator

# Tiny networks gain nothing from threads, and lose a hundredfold where other processes share the cores.
# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hydra import initialize_config_module
from hypothesis import settings

pytest.register_assert_rewrite("tests.compatibility")

settings.register_profile("project", deadline=None)  # no test depends on the clock
settings.load_profile("project")

# Tests fork this process. A fork computes no gradient if the first backward of its parent came after an
# export or a fake tensor, since autograd then starts threads.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test starts from the same random state, and leaves the engine as it was."""
    engine = torch.backends.quantized.engine
    torch.manual_seed(0)
    yield
    assert torch.backends.quantized.engine == engine


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restores the environment: Lightning leaves MASTER_PORT in it, at which later jobs would all meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """Lets a module compose the configurations of the command."""
    with initialize_config_module("qat_lightning.conf", version_base="1.3"):
        yield
