from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import qat_lightning
from qat_lightning.cli.train import train
from qat_lightning.quantize.options import Settings
from qat_lightning.tasks.models import DigitsCNN

CONF = Path(__file__).parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"
)
SHORT = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "+trainer.limit_train_batches=3",
]

pytestmark = [
    pytest.mark.usefixtures("hydra"),
    # Going on in another folder.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # The reference recipe freezes later than a shortened run ends, of which the user is told.
    pytest.mark.filterwarnings("ignore:.*freeze.*:UserWarning"),
]


def configure(folder: Path, *overrides: str) -> DictConfig:
    return compose("train", overrides=[f"output_dir={folder}", "report=false", *overrides])


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    metrics = train(configure(folder, *overrides))
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    return metrics


def command(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qat_lightning", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# What the configuration says


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_field_is_an_argument_of_its_constructor(tmp_path: Path, group: str, option: str) -> None:
    missing = {"custom": ["model._target_=torch.nn.Identity"], "timm": ["model.name=resnet18"]}
    missing["image_folder"] = [f"data.data_dir={tmp_path}"]
    cfg = configure(tmp_path, f"{group}={option}", *missing.get(option, []))
    checked = list(calls(OmegaConf.to_container(cfg, resolve=True)))
    assert len(checked) >= 7
    for target, arguments in checked:
        parameters = inspect.signature(get_object(target)).parameters
        if not any(each.kind == each.VAR_KEYWORD for each in parameters.values()):
            assert set(arguments) <= set(parameters), target


def calls(node: Any) -> Iterator[tuple[str, list[str]]]:
    for child in node.values() if isinstance(node, dict) else ():
        yield from calls(child)
    if isinstance(node, dict) and node.get("_target_"):
        yield node["_target_"], [key for key in node if not key.startswith("_")]


def test_every_field_and_file_is_commented() -> None:
    plain = {"_target_:", "_partial_:", "num_classes:", "momentum:", "weight_decay:", "backend:"}
    for group, option in OPTIONS:
        text = (CONF / group / f"{option}.yaml").read_text()
        fields = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
        silent = [each for each in fields if "#" not in each and each.split()[0] not in plain]
        assert text.startswith("#") or len(silent) <= 2, (group, option, silent)


def test_the_callback_is_configured_in_full() -> None:
    cfg = configure(Path())
    arguments = inspect.signature(qat_lightning.QuantizationAwareTraining).parameters
    options = vars(Settings())
    assert set(cfg.quantization) - {"_target_"} == {*arguments, *options} - {"options", "qconfig"}
    defaults = options | {name: each.default for name, each in arguments.items()}
    defaults = {name: value for name, value in defaults.items() if name in cfg.quantization}
    set_here = OmegaConf.to_container(cfg.quantization, resolve=True)
    assert isinstance(set_here, dict)
    del set_here["_target_"], set_here["output_dir"], defaults["output_dir"]
    assert set_here == {**defaults, "keep_float": [], "export": ["torch"]}


# What runs do


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow) if "float" in name or "torchvision" in name else name
        for name in EXPERIMENTS
    ],
)
def test_every_experiment_runs(tmp_path: Path, experiment: str) -> None:
    needs = {"torchvision_reference": reference_needs(tmp_path / "images")}
    folder = tmp_path / "run"
    metrics = run(folder, f"experiment={experiment}", *SHORT, *needs.get(experiment, []))
    if OmegaConf.load(folder / "config.yaml").quantization._target_:
        assert 0 <= metrics["int8_accuracy"] <= 1
        assert Path(metrics["int8_path"]) == folder / "int8.pt"
    else:
        assert 0 <= metrics["float_accuracy"] <= 1


def reference_needs(folder: Path) -> list[str]:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(8):
                image = Image.new("RGB", (40, 40), (index * 30, 0, 255 * (name == "cat")))
                image.save(folder / split / name / f"{index}.png")
    sizes = ["data.image_size=32", "data.batch_size=4", "data.val_fraction=0.25"]
    return [
        f"data.data_dir={folder}",
        "data.num_workers=0",
        "model.weights=null",
        "num_classes=2",
        *sizes,
    ]


def test_float_then_quantized(tmp_path: Path) -> None:
    baseline = run(tmp_path / "float", "experiment=digits_float", "trainer.max_epochs=5")
    assert baseline["float_accuracy"] >= 0.93
    assert baseline["fake_quant_accuracy"] is baseline["int8_accuracy"] is None
    weights = tmp_path / "float" / "float.pt"
    assert baseline["float_path"] == str(weights)
    assert baseline["float_bytes"] == pytest.approx(weights.stat().st_size, rel=0.01)

    folder = tmp_path / "int8"
    metrics = run(folder, "experiment=digits_demo", "trainer.max_epochs=2", f"weights={weights}")
    assert metrics["float_accuracy"] == baseline["float_accuracy"]
    assert metrics["int8_accuracy"] == pytest.approx(metrics["fake_quant_accuracy"], abs=0.01)
    assert metrics["int8_accuracy"] >= baseline["float_accuracy"] - 0.015
    assert metrics["int8_bytes"] == (folder / "int8.pt").stat().st_size
    assert metrics["int8_bytes"] < 0.4 * metrics["float_bytes"]
    assert Path(metrics["checkpoint"]).parent == folder / "checkpoints"
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "logs" / "version_0" / "metrics.csv").is_file()
    assert OmegaConf.load(folder / "config.yaml").quantization.output_dir == str(folder)

    from_checkpoint = run(
        tmp_path / "again", "experiment=digits_demo", *SHORT, f"weights={baseline['checkpoint']}"
    )
    assert from_checkpoint["float_accuracy"] == baseline["float_accuracy"]


@pytest.mark.parametrize("step", [3, 4])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, step: int) -> None:
    steps = [
        "+callbacks.steps._target_=lightning.pytorch.callbacks.ModelCheckpoint",
        "+callbacks.steps.dirpath=${output_dir}/steps",
        "+callbacks.steps.filename='step{step}'",
        "+callbacks.steps.auto_insert_metric_name=false",
        "+callbacks.steps.every_n_train_steps=1",
        "+callbacks.steps.save_top_k=-1",
        "callbacks.checkpoint.monitor=null",
    ]
    short = [*SHORT, "trainer.max_epochs=2", "+trainer.num_sanity_val_steps=0", *steps]
    short[short.index("+trainer.limit_train_batches=3")] = "+trainer.limit_train_batches=4"
    run(tmp_path / "whole", *short)
    interrupted = tmp_path / "whole" / "steps" / f"step{step}.ckpt"
    run(tmp_path / "resumed", *short, f"ckpt_path={interrupted}")
    weights, again = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    )
    tensors = {key for key, value in weights.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 40
    assert all(torch.equal(weights[key], again[key]) for key in tensors)
    int8, same = (
        qat_lightning.load_int8(tmp_path / name / "int8.pt", DigitsCNN()) for name in ("whole", "resumed")
    )
    images = torch.randn(64, 1, 8, 8)
    assert torch.equal(int8(images), same(images))


def test_fast_dev_run(tmp_path: Path) -> None:
    metrics = run(tmp_path, "+trainer.fast_dev_run=true", "trainer.enable_progress_bar=false")
    assert metrics["checkpoint"] == "last"
    assert metrics["int8_accuracy"] is not None


def test_each_exported_file_is_scored(tmp_path: Path) -> None:
    metrics = run(tmp_path, "experiment=digits_demo", "trainer.max_epochs=2", "export=all")
    assert [Path(path).name for path in metrics["exported"]] == ["int8.pt", "int8.onnx", "int8.xml"]
    for path, scores in metrics["exported"].items():
        assert scores["accuracy"] == pytest.approx(metrics["fake_quant_accuracy"], abs=0.05)
        assert scores["bytes"] >= Path(path).stat().st_size


def test_no_conversion(tmp_path: Path) -> None:
    metrics = run(tmp_path, *SHORT, "quantization.convert=null")
    assert metrics["fake_quant_accuracy"] is not None
    assert metrics["int8_accuracy"] is metrics["int8_path"] is None


def test_preflight_only_prints_a_table_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(configure(tmp_path, "preflight=only")) == {}
    shown = capsys.readouterr().out
    assert "100.0% of the multiply-adds, 4 layers" in shown
    assert "3 Conv2d+BatchNorm2d+ReLU" in shown
    assert list(tmp_path.iterdir()) == []


def test_preflight_is_true_false_or_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be true, false or only, but received 'maybe'"):
        train(configure(tmp_path, "preflight=maybe"))
    with pytest.raises(ValueError, match="backend=float has no int8"):
        train(configure(tmp_path, "preflight=only", "backend=float"))


def test_num_classes_has_to_be_the_datas(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 10 and num_classes is 7\. Set num_classes=10"):
        run(tmp_path, "num_classes=7")


def test_a_job_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    environment, arguments = dict(os.environ), list(sys.argv)
    run(tmp_path, "+trainer.fast_dev_run=true", "trainer.enable_progress_bar=false")
    assert dict(os.environ) == environment
    assert sys.argv == arguments


# The command


def test_help_says_what_to_type(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("qat-train")
    shown = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for part in ("qat-train experiment=digits_demo weights=", "-m backend=x86,qnnpack"):
        assert part in shown.stdout
    assert "backend: fbgemm, float, onednn, onnxruntime, openvino, qnnpack, x86" in shown.stdout
    assert "freeze_observers_at: 0.5" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_multirun_of_two_processes_each(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    probed = tmp_path_factory.mktemp("probed")
    done = command(
        tmp_path,
        "--multirun",
        "backend=float,x86",
        "experiment=digits_demo",
        "hydra.sweep.dir=sweep",
        *SHORT,
        "trainer=ddp_cpu",
        "+callbacks.probe._target_=tests.grid_probe.GridProbe",
        f"+callbacks.probe.folder={probed}",
    )
    assert done.stderr == ""
    grids = [torch.load(probed / f"grid{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(grids[0]) > 8
    assert grids[0].keys() == grids[1].keys()
    assert all(torch.equal(grids[0][name], grids[1][name]) for name in grids[0])
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        assert (folder / "metrics.json").is_file(), done.stdout
        assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert json.loads((folder / "metrics.json").read_text())["int8_accuracy"] is not None
    assert [path.name for path in tmp_path.rglob("int8.pt")] == ["int8.pt"]
    logs = [path.name for path in tmp_path.rglob("*.log")]
    assert set(logs) <= {"train.log"}  # nothing from the second processes
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_a_run_is_quiet(tmp_path: Path) -> None:
    done = command(tmp_path, "experiment=digits_demo", "hydra.run.dir=run", *SHORT)
    assert done.stderr == ""
    before, report = done.stdout.split("Findings\n")
    lines = [*before.splitlines(), *report.partition("Report: ")[2].splitlines()]
    assert len(lines) < 20
    assert any("int8" in line and "%" in line for line in lines)
    assert not any("Tip" in line or "GPU available" in line for line in lines)
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file()
