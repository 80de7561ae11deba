"""Convolutional networks and vision transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision

from exports import Export

IMAGE = {"image": torch.zeros(2, 3, 64, 64)}
BATCH = {"image": {0: "batch"}}

MODELS: dict[str, Callable[[], Export]] = {
    "resnet18": lambda: Export(torchvision.models.resnet18(), IMAGE, BATCH),
    "densenet121": lambda: Export(torchvision.models.densenet121(), IMAGE, BATCH),
}
