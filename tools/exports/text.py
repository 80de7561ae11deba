"""Language models: encoders, decoders, both, mixtures of experts, state spaces; from configurations, weights random.

Two layers and small widths, no two alike where an architecture allows it; the structure of a block is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPTextConfig,
    CLIPTextModel,
    DynamicCache,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from exports.pytorch import Export

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
AXES = {0: "batch", 1: "length"}


class Masked(nn.Module):
    """A model over token ids and a mask, with its first output alone."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64[n, s], int64[n, s] -> the first output."""
        return self.model(input_ids, attention_mask=attention_mask, return_dict=False, **self.fixed)[0]


class Unmasked(nn.Module):
    """A model over token ids alone."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64[n, s] -> the first output."""
        return self.model(input_ids, return_dict=False, **self.fixed)[0]


class Seq2Seq(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        """What the encoder reads, int64[n, t] -> logits."""
        given = {"decoder_input_ids": decoder_input_ids, "use_cache": False, "return_dict": False}
        return self.model(source, **given)[0]


class Cached(nn.Module):
    """A decoder with its cache of keys and values as inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *cache: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """int64[n, s], int64[n, p + s], keys, values [n, heads, p, d] -> logits, the same [n, heads, p + s, d]."""
        past = DynamicCache(list(zip(cache[::2], cache[1::2], strict=True)))
        out = self.model(input_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)
        layers = out.past_key_values.layers
        return out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


class Attention(nn.Module):
    """nn.MultiheadAttention between two linear layers, with the form of its mask and layout."""

    def __init__(self, batch_first: bool, kdim: int | None = None) -> None:
        super().__init__()
        self.inside = nn.Linear(23, 40)
        self.attention = nn.MultiheadAttention(40, 5, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.memory = nn.Linear(23, kdim or 40)
        self.outside = nn.Linear(40, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, s, 23] or [s, n, 23] -> float32[..., 11]."""
        q, m = self.inside(x), self.memory(x)
        return self.outside(self.attention(q, m, m, need_weights=False)[0])


class Stack(nn.Module):
    """nn.TransformerEncoder or nn.TransformerDecoder over embedded tokens."""

    def __init__(self, decoder: bool, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        layer = kind(40, 5, 67, activation="gelu", norm_first=norm_first, batch_first=batch_first)
        stack = nn.TransformerDecoder if decoder else nn.TransformerEncoder
        self.embed = nn.Embedding(101, 40)
        self.layers = stack(layer, 2)
        self.head = nn.Linear(40, 13)
        self.decoder = decoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64[n, s] -> float32[n, s, 13]."""
        x = self.embed(ids)
        return self.head(self.layers(x, x) if self.decoder else self.layers(x))


def config(kind: str, **given: Any) -> Any:
    """A small configuration of an architecture."""
    found = AutoConfig.for_model(kind, **given)
    if hasattr(found, "use_cache"):
        found.use_cache = False
    return found


def build(
    auto: Any, kind: str, given: Mapping[str, Any], attention: str | None = "eager", experts: str = "batched_mm"
) -> nn.Module:
    """A model with random weights; experts as a fetch of weights for each token, or as an `eager` loop."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    if "num_experts_per_tok" in given:
        chosen["experts_implementation"] = experts
    return auto.from_config(config(kind, **given), **chosen)


def masked(model: nn.Module, opset: int = 18, **fixed: Any) -> Export:
    """Over ids and a mask, batch and length dynamic."""
    args = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return Export(Masked(model, **fixed), args, dict.fromkeys(args, AXES), opset)


def unmasked(model: nn.Module, opset: int = 18, **fixed: Any) -> Export:
    """Over ids alone."""
    return Export(Unmasked(model, **fixed), {"input_ids": IDS}, {"input_ids": AXES}, opset)


def both(model: nn.Module, source: torch.Tensor = IDS, axes: Mapping[int, str] = AXES) -> Export:
    """An encoder and a decoder."""
    args = {"source": source, "decoder_input_ids": IDS[:, :7]}
    return Export(Seq2Seq(model), args, {"source": axes, "decoder_input_ids": {0: "batch", 1: "target"}})


def cached(model: Any) -> Export:
    """A decoder with five past positions."""
    plan = model.config
    heads = getattr(plan, "num_key_value_heads", None) or plan.num_attention_heads
    size = getattr(plan, "head_dim", None) or plan.hidden_size // plan.num_attention_heads
    names = [f"{kind}_{layer}" for layer in range(plan.num_hidden_layers) for kind in ("key", "value")]
    args = {"input_ids": IDS[:, :3], "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    args |= {name: torch.randn(2, heads, 5, size) for name in names}
    axes: dict[str, Mapping[int, str]] = {"input_ids": AXES, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {name: {0: "batch", 2: "past"} for name in names}
    return Export(Cached(model), args, axes)


def floats(model: nn.Module, batch_axis: int = 0) -> Export:
    """Over vectors of 23 numbers."""
    return Export(model, {"x": torch.randn(3, 7, 23)}, {"x": {batch_axis: "batch", 1 - batch_axis: "length"}})


def unmasked_stack(model: nn.Module) -> Export:
    """A torch stack over ids."""
    return Export(model, {"ids": IDS}, {"ids": AXES})


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 76,
    "vocab_size": 101,
}
GROUPED = SMALL | {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "pad_token_id": 0}
SHORT = {"max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 48, "encoder_ffn_dim": 76, "decoder_ffn_dim": 68, "vocab_size": 101, "pad_token_id": 1}
LONG = {"max_source_positions": 24, "max_target_positions": 24, "num_mel_bins": 11}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL | SHORT,
    "roberta": SMALL | SHORT,
    "albert": SMALL | SHORT | {"embedding_size": 29},
    "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 76, "vocab_size": 101} | SHORT,
    "electra": SMALL | SHORT | {"embedding_size": 29},
    "deberta-v2": SMALL | SHORT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
                                   "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "deberta": SMALL | SHORT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                  "max_relative_positions": 16},
    "mpnet": SMALL | SHORT,
    "modernbert": SMALL | SHORT | {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    "xlm": {"emb_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 101, "n_words": 101} | SHORT,
    "roformer": SMALL | SHORT | {"embedding_size": 48},
    "nystromformer": SMALL | SHORT | {"num_landmarks": 4, "segment_means_seq_len": 12},
    "squeezebert": SMALL | SHORT | {"embedding_size": 48},
    "fnet": SMALL | SHORT,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 76, "vocab_size": 101, "n_positions": 64},
    "gpt_neox": SMALL | SHORT | {"rotary_pct": 0.5},
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 76, "rotary_dim": 6, "vocab_size": 101,
             "n_positions": 64},
    "gpt_neo": {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 76, "vocab_size": 101,
                "attention_types": [[["global", "local"], 1]], "window_size": 8} | SHORT,
    "gpt_bigcode": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 76, "vocab_size": 101, "n_positions": 64},
    "opt": SMALL | SHORT | {"ffn_dim": 76, "word_embed_proj_dim": 48},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 101},
    "falcon": SMALL | SHORT | {"multi_query": True, "alibi": False},
    "falcon_alibi": SMALL | SHORT | {"multi_query": False, "alibi": True, "new_decoder_architecture": False},
    "falcon_new": SMALL | SHORT | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 6},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 14},
    "gemma": GROUPED | {"head_dim": 14},
    "gemma2": GROUPED | {"head_dim": 14, "sliding_window": 6},
    "gemma3_text": GROUPED | {"head_dim": 14, "sliding_window": 6},
    "phi": SMALL | SHORT | {"partial_rotary_factor": 0.5},
    "phi3": GROUPED | SHORT | {"original_max_position_embeddings": 64},
    "stablelm": GROUPED | {"partial_rotary_factor": 0.4, "qk_layernorm": True},
    "starcoder2": GROUPED,
    "olmo2": GROUPED,
    "olmo": GROUPED,
    "cohere": GROUPED | {"use_qk_norm": True},
    "cohere2": GROUPED | {"sliding_window": 6},
    "granite": GROUPED,
    "glm": GROUPED | {"head_dim": 12, "partial_rotary_factor": 0.5},
    "smollm3": GROUPED,
    "nemotron": GROUPED,
    "persimmon": SMALL | SHORT | {"partial_rotary_factor": 0.5},
    "codegen": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 76, "rotary_dim": 6, "vocab_size": 101,
             "n_positions": 64},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "vocab_size": 101, "max_seq_len": 64},
    "xglm": {"d_model": 48, "num_layers": 2, "attention_heads": 4, "ffn_dim": 76, "vocab_size": 101} | SHORT,
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 5},
    "qwen2_moe": GROUPED | EXPERTS | {"num_experts": 5, "moe_intermediate_size": 34,
                                      "shared_expert_intermediate_size": 38},
    "qwen3_moe": GROUPED | EXPERTS | {"num_experts": 5, "moe_intermediate_size": 34, "head_dim": 14},
    "olmoe": GROUPED | EXPERTS | {"num_experts": 5},
    "granitemoe": GROUPED | EXPERTS | {"num_local_experts": 5},
    "deepseek_v2": SMALL | EXPERTS | {"n_routed_experts": 4, "moe_intermediate_size": 34, "kv_lora_rank": 22,
                                      "q_lora_rank": None, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10,
                                      "v_head_dim": 13, "n_group": 1, "topk_group": 1,
                                      "first_k_dense_replace": 1, "n_shared_experts": 1},
}  # fmt: skip

UNMASKED: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 20, "num_hidden_layers": 2, "state_size": 5, "vocab_size": 101, "time_step_rank": 3},
    "rwkv": {"hidden_size": 20, "attention_hidden_size": 20, "num_hidden_layers": 2, "intermediate_size": 38,
             "vocab_size": 101, "context_length": 64},
}  # fmt: skip

BOTH: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 48, "d_kv": 13, "d_ff": 76, "num_layers": 2, "num_heads": 4, "vocab_size": 101},
    "mt5": {"d_model": 48, "d_kv": 13, "d_ff": 76, "num_layers": 2, "num_heads": 4, "vocab_size": 101},
    "bart": LAYERS | WIDTHS | SHORT,
    "mbart": LAYERS | WIDTHS | SHORT,
    "marian": LAYERS | WIDTHS | SHORT | {"decoder_start_token_id": 1},
    "pegasus": LAYERS | WIDTHS | SHORT,
    "m2m_100": LAYERS | WIDTHS | SHORT,
    "blenderbot": LAYERS | WIDTHS | SHORT,
}

CACHED = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "mistral", "phi3")
NATIVE = ("bert", "llama", "qwen3", "gemma2", "gpt_neox")  # at the first opset with whole attention operators
WIDER = (
    "bert",
    "roberta",
    "modernbert",
    "gpt2",
    "llama",
    "qwen3",
    "gemma2",
    "mistral",
    "opt",
    "gpt_neox",
    "falcon",
    "mixtral",
)


def _decoder(name: str, attention: str = "eager", experts: str = "batched_mm") -> nn.Module:
    kind = name if name in SPELLED else name.split("_")[0]
    return build(AutoModelForCausalLM, kind, DECODERS[name], attention, experts)


def _named(name: str, attention: str) -> nn.Module:
    if name in DECODERS:
        return _decoder(name, attention)
    return build(AutoModel, name, ENCODERS[name], attention)


SPELLED = frozenset(DECODERS) - {"falcon_alibi", "falcon_new"}

MODELS: dict[str, Callable[[], Export]] = {
    **{name: partial(lambda n: masked(build(AutoModel, n, ENCODERS[n])), name) for name in ENCODERS},
    **{name: partial(lambda n: masked(_decoder(n), use_cache=False), name) for name in DECODERS},
    **{name: partial(lambda n: unmasked(build(AutoModelForCausalLM, n, UNMASKED[n], None), use_cache=False), name)
       for name in UNMASKED},
    **{name: partial(lambda n: both(build(AutoModelForSeq2SeqLM, n, BOTH[n])), name) for name in BOTH},
    **{f"{name}_cache": partial(lambda n: cached(_decoder(n)), name) for name in CACHED},
    **{f"{name}_sdpa": partial(lambda n: masked(_named(n, "sdpa")), name) for name in WIDER},
    **{f"{name}_loop": partial(lambda n: masked(_decoder(n, experts="eager"), use_cache=False), name)
       for name, given in DECODERS.items() if "num_experts_per_tok" in given},
    **{f"{name}_opset23": partial(lambda n: masked(_named(n, "sdpa"), 23), name) for name in NATIVE},
    "llama_deep": lambda: cached(build(AutoModelForCausalLM, "llama", GROUPED | {"num_hidden_layers": 32})),
    "whisper": lambda: both(
        WhisperForConditionalGeneration(WhisperConfig(**LAYERS, **WIDTHS, **LONG, attn_implementation="eager")),
        torch.randn(2, 11, 48), {0: "batch"},
    ),
    "clip_text": lambda: masked(CLIPTextModel(CLIPTextConfig(**SMALL, **SHORT, attn_implementation="eager"))),
    "siglip_text": lambda: masked(
        SiglipTextModel(SiglipTextConfig(**SMALL, **SHORT, projection_size=48, attn_implementation="eager"))
    ),
    "torch_mha": lambda: floats(Attention(True)),
    "torch_mha_time_first": lambda: floats(Attention(False), 1),
    "torch_mha_cross": lambda: floats(Attention(True, 17)),
    "torch_encoder": lambda: unmasked_stack(Stack(False, False, True)),
    "torch_encoder_prenorm": lambda: unmasked_stack(Stack(False, True, False)),
    "torch_decoder": lambda: unmasked_stack(Stack(True, True, True)),
}  # fmt: skip
