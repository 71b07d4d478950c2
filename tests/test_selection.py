from __future__ import annotations

import pytest
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.quantize.selection import check_modules, find_networks, resolve_keep_float, split_patterns
from tests.networks import ConvBnRelu, Residual, Stubbed


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Residual()
        self.students = nn.ModuleList([ConvBnRelu(), nn.ReLU()])
        self.named = nn.ModuleDict({"eager": Stubbed()})
        self.loss = nn.CrossEntropyLoss()
        self.metrics = MetricCollection({"accuracy": MulticlassAccuracy(3)})
        self.norm = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())


def test_networks_are_the_containers_that_hold_quantizable_layers() -> None:
    found = find_networks(Everything())
    assert found.networks == ("model", "students.0", "named.eager")
    assert found.loose == ()


def test_layers_directly_on_the_module_are_loose() -> None:
    module = Everything()
    module.head, module.stem = nn.Linear(4, 4), nn.Conv2d(3, 3, 1)
    module.listed = nn.ModuleList([nn.Linear(2, 2)])
    assert find_networks(module).loose == ("head", "stem", "listed.0")


def test_a_network_inside_a_metric_is_no_network() -> None:
    module = Everything()
    metric = MulticlassAccuracy(3)
    metric.feature_extractor = Residual()
    module.perceptual = metric
    assert "perceptual" not in find_networks(module).networks


def test_a_network_registered_twice_is_found_once() -> None:
    module = Everything()
    module.again = module.model
    assert find_networks(module).networks == ("model", "students.0", "named.eager")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["fc"], ("fc",)),
        (["block.*"], ("block.0", "block.1", "block.2")),
        (["*.0"], ("stem.0", "block.0")),
        ([nn.Conv2d], ("stem.0", "block.0")),
        ([nn.Sequential], ("stem", "block")),
        (["block", "block.0", nn.ReLU6], ("stem.2", "block")),
        ([], ()),
    ],
)
def test_keep_float_resolves_to_the_outermost_names(
    patterns: list[str | type[nn.Module]], names: tuple[str, ...]
) -> None:
    assert resolve_keep_float(Residual(), patterns) == names


def test_a_pattern_need_match_in_one_of_several_networks_only() -> None:
    networks = [Residual(), Stubbed()]
    assert split_patterns(networks, ["stem", "conv1", nn.Linear]) == [
        ("stem", nn.Linear),
        ("conv1", nn.Linear),
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blok.*", r"'blok\.\*', which matches nothing in Residual and Stubbed\. Nearest: 'block\.\d'"),
        (nn.LSTM, r"'LSTM', which matches nothing in Residual and Stubbed\. Nearest: '"),
    ],
)
def test_a_pattern_that_matches_nothing_gets_the_nearest_names(
    pattern: str | type[nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_patterns([Residual(), Stubbed()], [pattern])


def test_a_pattern_of_another_type() -> None:
    with pytest.raises(
        TypeError, match=r"takes names, globs or types of modules, but received 3 of type int"
    ):
        resolve_keep_float(Residual(), [3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="received Linear"):
        resolve_keep_float(Residual(), [nn.Linear(1, 1)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["modle"], r"has none called 'modle'\. Nearest: 'model"),
        (["norm"], r"modules names 'norm', which holds no convolution and no linear layer.*Leave it out"),
        (["model.fc"], r"modules names 'model\.fc', which is a single layer.*Name the network"),
        (["model", "model.block"], r"'model\.block', which is inside 'model', and names that too\. Name one"),
    ],
)
def test_modules_that_cannot_be_quantized(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_modules(Everything(), names)


def test_modules_may_be_deep_inside() -> None:
    assert check_modules(Everything(), ["model.block", "named.eager"]) == ("model.block", "named.eager")
