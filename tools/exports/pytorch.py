"""How networks of PyTorch are written, with either of its exporters."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Export:
    """A network, example arguments by input name, and which of their axes are dynamic: {input: {axis: dimension}}."""

    model: nn.Module
    args: Mapping[str, torch.Tensor]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    opset: int = 18


def randomise(model: nn.Module) -> nn.Module:
    """Random numbers for everything that a fresh network has at zero or one: a proof must not pass by accident."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif float(tensor.min()) == float(tensor.max()) and isinstance(tensor, nn.Parameter):
                tensor.add_(torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=generator))
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()


def write(export: Export, path: Path, exporter: str) -> None:
    """Export with PyTorch's `dynamo` or `torchscript` exporter."""
    model = randomise(export.model)
    names, args = list(export.args), tuple(export.args.values())
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes: list[Any] = [dict.fromkeys(export.dynamic.get(n, {}), torch.export.Dim.DYNAMIC) for n in names]
            dynamic = any(shapes)
            taken = list(inspect.signature(model.forward).parameters.values())
            if taken[-1].kind is inspect.Parameter.VAR_POSITIONAL:
                shapes[len(taken) - 1 :] = [tuple(shapes[len(taken) - 1 :])]
            program = torch.onnx.export(
                model, args, dynamo=True, input_names=names, opset_version=export.opset,
                dynamic_shapes=tuple(shapes) if dynamic else None, verbose=False,
            )  # fmt: skip
            program.save(str(path), external_data=False)
        else:
            torch.onnx.export(
                model, args, str(path), dynamo=False, input_names=names, opset_version=min(export.opset, 20),
                dynamic_axes={n: dict(axes) for n, axes in export.dynamic.items()},
            )  # fmt: skip


WRITERS = {exporter: partial(write, exporter=exporter) for exporter in ("dynamo", "torchscript")}
