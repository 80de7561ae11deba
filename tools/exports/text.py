"""Language models: encoders, decoders, both, mixtures of experts, state spaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertModel

from exports import Export


class First(nn.Module):
    """A transformers model with its first output alone."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """The first output for the inputs in the order of `names`."""
        return self.model(**dict(zip(self.names, args, strict=True)), return_dict=False)[0]


def tokens(model: nn.Module) -> Export:
    """A model over token ids and a mask, batch and length dynamic."""
    ids = torch.randint(0, 50, (2, 12))
    axes = {0: "batch", 1: "length"}
    names = ("input_ids", "attention_mask")
    return Export(First(model, *names), {names[0]: ids, names[1]: torch.ones_like(ids)}, dict.fromkeys(names, axes))


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "vocab_size": 101,
}

MODELS: dict[str, Callable[[], Export]] = {
    "bert": lambda: tokens(BertModel(BertConfig(**SMALL, attn_implementation="eager"))),
}
