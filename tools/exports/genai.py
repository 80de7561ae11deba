"""python -m exports.genai FOLDER [NAME...], in tools/: decoders as the model builder of onnxruntime-genai writes them.

Fused attention over a cache, rotary positions inside, weights also in blocks of four bits.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime_genai.models.builder import create_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from exports import export_all, text
from exports.pytorch import randomise

ROUND = {"hidden_size": 64, "intermediate_size": 96}  # 4-bit blocks of 16 fill heads and neurons
GROUPED = text.GROUPED | ROUND | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 6},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 6},
    "phi": text.DECODERS["phi"] | ROUND | {"hidden_size": 128},  # half of a head is turned
    "phi3": GROUPED | {"original_max_position_embeddings": 64},
    "olmo": GROUPED,
    "granite": GROUPED,
}


def model(name: str) -> PreTrainedModel:
    """Random weights."""
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(text.config(name, **SIZES[name])))


def write(made: PreTrainedModel, path: Path, precision: str, **options: Any) -> None:
    """One file; what the builder writes besides (tokenizer, generation) is not there to be had."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        made.save_pretrained(source)
        details = {"extra_kwargs": {}, "hf_name": str(source), "hf_config": AutoConfig.from_pretrained(source)}
        with suppress(OSError, ValueError):
            create_model(str(source), str(source), str(out), precision, "cpu", folder, hf_details=details, **options)
        onnx.save(onnx.load(out / "model.onnx"), path)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {name: partial(model, name) for name in SIZES}

if __name__ == "__main__":
    logging.disable()
    export_all(
        __doc__,
        MODELS,
        {
            "genai": partial(write, precision="fp32"),
            "genai_half": partial(write, precision="fp16"),
            "genai_int4": partial(write, precision="int4", block_size=16),
        },
    )
