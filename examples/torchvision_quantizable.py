"""The six steps of PyTorch's quantization workflow, with torchvision's quantizable MobileNetV2.

PyTorch's guide has the user do each by hand; the comments say who does it here. Random images stand for a
data set, so that the script runs anywhere in a minute: the accuracy means nothing.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.quantization import mobilenet_v2

from qat_lightning import QuantizationAwareTraining


class Classifier(LightningModule):
    """MobileNetV2 as torchvision ships it for quantization."""

    def __init__(self) -> None:
        super().__init__()
        # 1. Make the model quantizable: torchvision has put QuantStub and DeQuantStub into this one, and its
        #    additions go through FloatFunctional. A model without them is traced instead (mode="fx").
        self.model = mobilenet_v2(weights=None, quantize=False, num_classes=4)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 4, (32,))
    data = DataLoader(TensorDataset(images, labels), batch_size=8)

    # 2. Fuse: the callback calls the model's own fuse_model(is_qat=True).
    # 3. Choose the scheme: by the name of the backend, or with your own QConfig (ours, or torch.ao's).
    # 4. Insert fake-quantization: the callback, before Lightning restores checkpoints and wraps for DDP.
    qat = QuantizationAwareTraining(backend="onednn", mode="eager", freeze_bn_at=1, freeze_observers_at=1)

    # 5. Train: as always, on any number of devices.
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[qat], logger=False)
    trainer.fit(Classifier(), data)

    # 6. Convert and run: at the end of fit, in eval mode, with the matching engine.
    print(f"int8 file: {qat.int8_path}")
    Trainer(accelerator="cpu", logger=False).test(qat.int8_module, data)
