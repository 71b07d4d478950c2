"""A small folder of photographs."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image


def write_photographs(folder: Path) -> Path:
    """Writes train/ and test/ with two classes of 80 and 20 images each, told apart by their brightness."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 80), ("test", 20)):
        for label, brightness in (("dark", 0), ("light", 128)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 128, (3, 32, 32), generator=generator) + brightness
                to_pil_image(image.byte()).save(folder / split / label / f"{i}.png")
    return folder
