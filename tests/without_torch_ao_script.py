"""The life of a captured network in a process in which this package cannot import `torch.ao`.

torch imports `torch.ao` by itself. So what is refused is not the module, but the import by a module of this
package.

Usage: python -m tests.without_torch_ao_script FOLDER
"""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

_import = builtins.__import__


def refuse_torch_ao(name: str, *args: Any, **kwargs: Any) -> Any:
    """Imports like Python, unless a module of this package asks for torch.ao."""
    given = dict(zip(("globals", "locals", "fromlist", "level"), args, strict=False)) | kwargs
    asks = str((given.get("globals") or {}).get("__name__", ""))
    wanted = [name, *(f"{name}.{each}" for each in given.get("fromlist") or ())]
    if asks.split(".")[0] == "qat_lightning" and any(f"{each}.".startswith("torch.ao.") for each in wanted):
        raise ImportError(f"{asks} imports {name}")
    return _import(name, *args, **kwargs)


def main(folder: Path) -> None:
    """Prepares, trains, freezes, stores, resumes and exports; then imports what needs torch.ao."""
    builtins.__import__ = refuse_torch_ao

    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from qat_lightning import QuantizationAwareTraining, export_onnx, load_runtime
    from tests.reading import ToldHow, sentences
    from tests.runs import trainer

    def fit(epochs: int, ckpt_path: Path | None = None) -> ToldHow:
        torch.manual_seed(0)
        module = ToldHow()
        qat = QuantizationAwareTraining(
            freeze_observers_at=0.6, freeze_bn_at=0.8, convert=None, preflight=False
        )
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer(folder, qat, checkpoint, max_epochs=epochs).fit(module, ckpt_path=ckpt_path)
        return module

    fit(2)
    module = fit(4, folder / "epoch=1.ckpt").eval()
    inputs, _ = next(iter(sentences(8, seed=2)))
    export_onnx(module.model, folder / "model.onnx", inputs)
    with torch.no_grad():
        fake_quant = module.model(**inputs).logits
    torch.save((fake_quant, load_runtime(folder / "model.onnx")(**inputs)["logits"]), folder / "outputs.pt")
    loaded = [name for name in sys.modules if name.startswith("qat_lightning.modes.")]
    refused = []
    for room in ("eager.mode", "native.lower"):
        try:
            __import__(f"qat_lightning.modes.{room}")
        except ImportError as error:
            refused.append(str(error))
    print(json.dumps({"loaded": loaded, "refused": refused}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
