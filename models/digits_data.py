"""scikit-learn's handwritten digits: the fixed split, the distortions used for training, the arrays on disk."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

SPLIT_SEED = 0
CALIBRATION_IMAGES = 256


def load_split() -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Training images, held-out images (both float32[n, 1, 8, 8] in 0..1), training labels, held-out labels (int64[n]).

    The two halves are stratified by digit and always the same: 898 images to train on, 899 held out.
    """
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    return tuple(train_test_split(images, labels, test_size=0.5, random_state=SPLIT_SEED, stratify=labels))


def distort(images: Tensor) -> Tensor:
    """Each image float32[n, 1, 8, 8] under its own small affine map and elastic field; strokes lighter or darker.

    Coordinates are those of grid_sample: the image spans -1..1, so one pixel is 0.25 wide.
    """
    n = len(images)
    angle = uniform(n, 0.2)
    shear = uniform(n, 0.2)
    scale_x = 1 + uniform(n, 0.15)
    scale_y = 1 + uniform(n, 0.15)
    cosine, sine = angle.cos(), angle.sin()
    maps = torch.stack(
        [
            torch.stack([scale_x * cosine, shear - sine, uniform(n, 0.25)], dim=1),
            torch.stack([sine, scale_y * cosine, uniform(n, 0.25)], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(maps, [n, 1, 8, 8], align_corners=False)
    field = functional.interpolate(torch.randn(n, 2, 3, 3) * 0.06, size=8, mode="bicubic", align_corners=True)
    moved = functional.grid_sample(images, grid + field.permute(0, 2, 3, 1), mode="bicubic", align_corners=False)
    exponent = torch.exp(uniform(n, 0.25)).reshape(n, 1, 1, 1)
    return moved.clamp(0, 1) ** exponent


def uniform(n: int, bound: float) -> Tensor:
    """float32[n], uniform in -bound..bound, from the global generator."""
    return (torch.rand(n) * 2 - 1) * bound


def save_arrays(folder: Path) -> None:
    """Write the unlabelled images for calibration (training half) and the labelled ones for evaluation (the other)."""
    train_images, heldout_images, _, heldout_labels = load_split()
    np.savez_compressed(folder / "digits_calibration.npz", image=train_images[:CALIBRATION_IMAGES])
    np.savez_compressed(folder / "digits_evaluation.npz", image=heldout_images, labels=heldout_labels)
