"""python -m exports FOLDER [NAME...], in tools/: networks of PyTorch, with both of its exporters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from exports import export_all, text, vision
from exports.pytorch import WRITERS, Export


def seeded(build: Callable[[], Export]) -> Callable[[], Export]:
    """The same weights whichever networks were built before."""

    def build_anew() -> Export:
        torch.manual_seed(0)
        return build()

    return build_anew


if __name__ == "__main__":
    export_all(__doc__, {n: seeded(build) for n, build in (vision.MODELS | text.MODELS).items()}, WRITERS)
