"""python -m exports.forms FOLDER, in tools/: small networks fused, quantised, halved and dumped by ONNX Runtime.

What a user has in hand is often not an exporter's file but what a tool made of it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, ViTConfig, ViTModel

from exports import text
from exports.pytorch import Export, write

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Cnn(nn.Module):
    """Residual, depthwise and gated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 22, 3, 2, 1, bias=False), nn.BatchNorm2d(22), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(22, 34, 3, padding=1), nn.ReLU(), nn.Conv2d(34, 22, 3, padding=1))
        self.wide = nn.Sequential(nn.Conv2d(22, 46, 1), nn.ReLU6(), nn.Conv2d(46, 46, 3, 2, 1, groups=46), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(46, 10, 1), nn.ReLU(), nn.Conv2d(10, 46, 1), nn.Sigmoid()
        )
        self.narrow = nn.Conv2d(46, 26, 1)
        self.head = nn.Linear(26, 11)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """float32[n, 3, h, w] -> float32[n, 11]."""
        x = self.stem(image)
        x = self.wide(torch.relu(x + self.left(x)))
        x = torch.relu(self.narrow(x * self.gate(x)))
        return self.head(x.mean((2, 3)))


def vit() -> Export:
    """A small ViT."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 76}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, attn_implementation="eager"))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image, return_dict=False)[0]

    return Export(First(), {"image": IMAGE}, {"image": {0: "batch"}})


ROUND = {"hidden_size": 64, "intermediate_size": 96}  # 4-bit blocks of 16 fill heads and neurons
SIZES: dict[str, dict[str, Any]] = {
    "bert": text.ENCODERS["bert"] | ROUND,
    "gpt2": text.DECODERS["gpt2"] | {"n_embd": 64, "n_inner": 96},
    "llama": text.DECODERS["llama"] | ROUND | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": text.DECODERS["qwen3"] | {"head_dim": 16},
    "gpt_neox": text.DECODERS["gpt_neox"] | ROUND,
    "mixtral": text.DECODERS["mixtral"] | ROUND | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
SOURCES: dict[str, Callable[[], Export]] = {
    "cnn": lambda: Export(Cnn(), {"image": IMAGE}, {"image": {0: "batch"}}),
    "bert": lambda: text.masked(text.build(AutoModel, "bert", SIZES["bert"])),
    "vit": vit,
    **{name: partial(lambda n: text.masked(text.build(AutoModelForCausalLM, n, SIZES[n]), use_cache=False), name)
       for name in ("gpt2", "llama", "qwen3", "gpt_neox", "mixtral")},
    "t5": text.MODELS["t5"],
    "gpt2_cache": text.MODELS["gpt2_cache"],
}  # fmt: skip
KINDS = {"bert": ("bert", 4, 64), "gpt2": ("gpt2", 4, 64), "gpt2_cache": ("gpt2", 4, 48), "vit": ("vit", 4, 48),
         "t5": ("t5", 4, 52), "llama": ("gpt2", 4, 64), "qwen3": ("gpt2", 6, 96),
         "gpt_neox": ("gpt_neox", 4, 64)}  # fmt: skip


class Feeds(quantization.CalibrationDataReader):
    """Four random batches for a model."""

    def __init__(self, export: Export) -> None:
        shapes = export.args.items()
        self.rows = iter([{k: self._like(v, s) for k, v in shapes} for s in range(4)])

    @staticmethod
    def _like(tensor: torch.Tensor, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        if tensor.is_floating_point():
            return random.standard_normal(tensor.shape).astype(np.float32)
        return np.ones(tensor.shape, np.int64) if int(tensor.min()) == 1 else random.integers(2, 50, tensor.shape)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feed."""
        return next(self.rows, None)


def fused(
    path: Path, out: Path, kind: tuple[str, int, int], level: int = 0, half: bool = False, mha: bool = False
) -> None:
    """ONNX Runtime's transformer fusion; `kind` is (its model type, heads, width)."""
    name, heads, width = kind
    options = FusionOptions(name)
    options.use_multi_head_attention = mha
    model = optimize_model(str(path), name, heads, width, options, level, only_onnxruntime=level > 0)
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(out))
    print({k: v for k, v in model.get_fused_operator_statistics().items() if v}, file=sys.stderr)


def fused_dynamic(path: Path, out: Path, kind: tuple[str, int, int]) -> None:
    """Fused, then quantised: attention over integers."""
    with tempfile.TemporaryDirectory() as folder:
        fused(path, Path(folder) / "fused.onnx", kind)
        quantization.quantize_dynamic(Path(folder) / "fused.onnx", out)


def static(path: Path, out: Path, export: Export, form: quantization.QuantFormat, **given: Any) -> None:
    """Calibrated 8-bit quantisation."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quantization.quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(str(ready), str(out), Feeds(export), quant_format=form, **given)


def dump(path: Path, out: Path, level: Any) -> None:
    """The graph as ONNX Runtime would run it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nbits(path: Path, out: Path, symmetric: bool, block: int = 16, bits: int = 4) -> None:
    """4-bit weights in blocks."""
    quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=block, is_symmetric=symmetric, bits=bits)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), False)


def half(path: Path, out: Path, **given: Any) -> None:
    """Weights and arithmetic in float16."""
    onnx.save(convert_float_to_float16(onnx.load(path), **given), out)


def forms(name: str, path: Path, export: Export) -> Iterable[tuple[str, Callable[[Path, Path], None]]]:
    """(suffix, how to make it) of every form that suits a network."""
    levels, formats = ort.GraphOptimizationLevel, quantization.QuantFormat
    if name in KINDS:
        yield "fused", partial(fused, kind=KINDS[name])
        yield "fused_mha", partial(fused, kind=KINDS[name], mha=True)
        yield "fused_dynamic", partial(fused_dynamic, kind=KINDS[name])
        yield "fused_ort", partial(fused, kind=KINDS[name], level=1)
        yield "fused_half", partial(fused, kind=KINDS[name], half=True)
    yield "dump_basic", partial(dump, level=levels.ORT_ENABLE_BASIC)
    yield "dump_extended", partial(dump, level=levels.ORT_ENABLE_EXTENDED)
    yield "half", half
    yield "half_io", partial(half, keep_io_types=True)
    if name in ("cnn", "vit", "bert", "gpt2", "llama"):
        for per_channel in (False, True):
            tag = "channel" if per_channel else "tensor"
            yield f"qdq_{tag}", partial(static, export=export, form=formats.QDQ, per_channel=per_channel)
            yield f"qoperator_{tag}", partial(static, export=export, form=formats.QOperator, per_channel=per_channel)
            yield f"dynamic_{tag}", lambda a, b, c=per_channel: quantization.quantize_dynamic(a, b, per_channel=c)
        yield "qdq_uint8", partial(
            static, export=export, form=formats.QDQ, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QUInt8,
        )  # fmt: skip
    if name not in ("cnn", "vit"):
        yield "nbits", partial(nbits, symmetric=True)
        yield "nbits_asymmetric", partial(nbits, symmetric=False)
        yield "nbits_8", partial(nbits, symmetric=True, bits=8, block=32)


def main() -> None:
    """Write FOLDER/NAME_EXPORTER_FORM.onnx; what a tool refuses is said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or SOURCES:
            for exporter in ("torchscript", "dynamo"):
                torch.manual_seed(0)
                export = SOURCES[name]()
                path = Path(folder) / f"{name}_{exporter}.onnx"
                try:
                    write(export, path, exporter)
                except Exception as error:
                    print(f"{name}_{exporter}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
                    continue
                for suffix, make in forms(name, path, export):
                    out = given.folder / f"{path.stem}_{suffix}.onnx"
                    try:
                        make(path, out)
                        print(out)
                    except Exception as error:
                        print(f"{out.stem}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
