"""Standard architectures at full and at half of every width, for deep_removal.py.

Needs torch==2.13.0, transformers, onnxscript. Both exporters of PyTorch write each network, so that coupling can be
checked on exports that no rule was written for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

warnings.filterwarnings("ignore")


class UNet(nn.Module):
    """The classic U-Net: two 3x3 convolutions a level, skips by concatenation, transposed convolutions upwards."""

    def __init__(self, width: int = 64, levels: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**k for k in range(levels + 1)]
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(self.block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(inside: int, outside: int) -> nn.Sequential:
        """conv-bn-relu twice."""
        layers: list[nn.Module] = []
        for a in (inside, outside):
            layers += [nn.Conv2d(a, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """float32[n, 3, h, w] -> float32[n, classes, h, w]; h and w multiples of 16."""
        skips = []
        x = image
        for k, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            x = self.merge[k](torch.cat([skips[k], self.up[k](x)], 1))
        return self.head(x)


class Logits(nn.Module):
    """A transformers classifier with one input and one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.model(image).logits


IMAGE = (torch.zeros(1, 3, 224, 224),)


def resnet50(half: bool) -> nn.Module:
    """Every width halves: all of them are free, residual sums included."""
    scale = 2 if half else 1
    sizes = [s // scale for s in (256, 512, 1024, 2048)]
    return Logits(
        ResNetForImageClassification(ResNetConfig(embedding_size=64 // scale, hidden_sizes=sizes, num_labels=1000))
    )


def mobilenet_v2(half: bool) -> nn.Module:
    """Depth multiplier one half, with widths of eight and the floor switched off."""
    config = MobileNetV2Config(
        depth_multiplier=0.5 if half else 1.0,
        depth_divisible_by=1,
        min_depth=1,
        finegrained_output=False,
        num_labels=1001,
    )
    return Logits(MobileNetV2ForImageClassification(config))


def unet(half: bool) -> nn.Module:
    """Every width halves."""
    return UNet(32 if half else 64)


def vit_b(half: bool) -> nn.Module:
    """ViT-B/16; FFN neurons and heads halve (see `halved`), the residual width is mixed by LayerNorm."""
    return Logits(ViTForImageClassification(ViTConfig(num_labels=1000, attn_implementation="eager")))


class Bert(nn.Module):
    """BERT-base with a classifier, over ids and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(BertConfig(attn_implementation="eager"))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64[n, s], int64[n, s] -> float32[n, 2]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def bert(half: bool) -> nn.Module:
    """BERT-base; FFN neurons and heads halve."""
    return Bert()


TOKENS = (torch.ones(1, 64, dtype=torch.int64), torch.ones(1, 64, dtype=torch.int64))


class Architecture(NamedTuple):
    """How to build a network, whether `half` scales it, and what to export it with."""

    build: Callable[[bool], nn.Module]
    scales: bool
    args: tuple[torch.Tensor, ...]
    names: tuple[str, ...]


ARCHITECTURES = {
    "resnet50": Architecture(resnet50, True, IMAGE, ("image",)),
    "mobilenet_v2": Architecture(mobilenet_v2, True, IMAGE, ("image",)),
    "unet": Architecture(unet, True, (torch.zeros(1, 3, 128, 128),), ("image",)),
    "vit_b": Architecture(vit_b, False, IMAGE, ("image",)),
    "bert": Architecture(bert, False, TOKENS, ("input_ids", "attention_mask")),
}


def halved(name: str) -> int:
    """Parameters of a transformer that go when half of its FFN neurons, heads and pooler channels go."""
    gone = 0
    for key, tensor in ARCHITECTURES[name].build(False).state_dict().items():
        hidden = any(part in key for part in ("query", "key.", "value", "intermediate", "pooler", "q_proj", "k_proj",
                                              "v_proj", "fc1"))  # fmt: skip
        reader = any(part in key for part in (".output.dense.weight", "o_proj.weight", "fc2.weight"))
        if hidden or reader or (name == "bert" and key.endswith("classifier.weight")):
            gone += tensor.numel() // 2
    return gone


def export(name: str, folder: Path, dynamo: bool, half: bool = False) -> Path:
    """Write one network with one of PyTorch's exporters, batch dynamic."""
    build, _, args, names = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build(half).eval()
    for module in model.modules():  # random statistics: folded BatchNorms must not be identities
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    path = folder / f"{name}{'_half' if half else ''}_{'dynamo' if dynamo else 'torchscript'}.onnx"
    if dynamo:
        shapes = {n: {0: torch.export.Dim.DYNAMIC} for n in names}
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            input_names=list(names),
            output_names=["out"],
            dynamic_shapes=shapes,
            verbose=False,
        )
        program.save(str(path), external_data=False)
    else:
        write(model, name, path)
    return path


def write(model: nn.Module, name: str, path: Path) -> Path:
    """Write a network of an architecture with the TorchScript exporter, batch dynamic."""
    _, _, args, names = ARCHITECTURES[name]
    torch.onnx.export(
        model,
        args,
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=list(names),
        output_names=["out"],
        dynamic_axes={n: {0: "batch"} for n in (*names, "out")},
    )
    return path
