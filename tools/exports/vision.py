"""Convolutional networks, vision transformers, audio, detection, diffusion and recurrent networks.

Most are a row of a table: the constructor's name, and what makes it small while its blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F

from exports.pytorch import Export

BATCH = {0: "batch"}
SIZES = {0: "batch", 2: "height", 3: "width"}
BATCH_AND_LENGTH = {0: "batch", 2: "length"}


def image(model: nn.Module, size: int = 64, axes: Mapping[int, str] = BATCH, channels: int = 3) -> Export:
    """A model over a square image."""
    return Export(model, {"image": torch.randn(2, channels, size, size)}, {"image": axes})


# Libraries ----------------------------------------------------------------------------------------------------------


def from_torchvision(name: str, size: int, options: Mapping[str, Any]) -> Export:
    """One of torchvision's classifiers."""
    return image(torchvision.models.get_model(name, weights=None, **options), size)


def from_timm(name: str, size: int, options: Mapping[str, Any]) -> Export:
    """One of timm's classifiers; `exportable` avoids scripted activations."""
    return image(timm.create_model(name, exportable=True, num_classes=17, **options), size)


def from_transformers(name: str, size: int, options: Mapping[str, Any], axes: Mapping[int, str] = BATCH) -> Export:
    """A transformers model by its class, from its own configuration, over an image."""
    made = getattr(transformers, name)
    config = made.config_class(**{"image_size": size, **options})
    config._attn_implementation = "eager"
    return image(First(made(config)), size, axes)


class First(nn.Module):
    """A transformers model with its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first output."""
        return self.model(x, return_dict=False)[0]


TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "mobilenet_v2": (64, {"width_mult": 0.5}),
    "mobilenet_v3_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "regnet_y_400mf": (64, {}),
    "googlenet": (96, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "squeezenet1_1": (64, {}),
    "mnasnet0_5": (64, {}),
}

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnext26ts": (64, {}),
    "coat_tiny": (64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "edgenext_xx_small": (64, {"depths": (1, 2, 2, 1)}),
    "mobilevit_xxs": (64, {}),
    "levit_128s": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2)}),
    "repvgg_a0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dla46_c": (64, {}),
    "res2net50_14w_8s": (64, {"layers": (1, 1, 1, 1)}),
    "res2next50": (64, {"layers": (1, 1, 1, 1)}),
    "skresnet18": (64, {}),
    "ecaresnet26t": (64, {"layers": (1, 1, 1, 1)}),
    "gcresnet33ts": (64, {}),
    "resnest14d": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2}),
    "beit_base_patch16_224": (64, {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 2}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 128)}),
    "nf_regnet_b0": (64, {}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1)}),
    "ghostnet_050": (64, {}),
    "mobilenetv4_hybrid_medium": (64, {}),
    "fastvit_t8": (64, {"layers": (1, 1, 1, 1)}),
    "convnextv2_atto": (64, {"depths": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "davit_tiny": (64, {"depths": (1, 1, 1), "embed_dims": (48, 96, 192), "num_heads": (3, 6, 12)}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "pit_ti_224": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "tnt_s_legacy_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "convit_tiny": (64, {"img_size": 64, "depth": 2, "local_up_to_layer": 1}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 48, "stages": (1, 1, 2, 1)}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2, "qk_norm": True}),
    "mambaout_femto": (64, {"depths": (1, 1, 1, 1)}),
    "hgnetv2_b0": (64, {}),
    "starnet_s1": (64, {}),
    "tiny_vit_5m_224": (224, {"depths": (1, 1, 1, 1)}),
    "lambda_resnet26t": (64, {"img_size": 64}),
    "botnet26t_256": (64, {"img_size": 64}),
    "dpn48b": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
    "rexnet_100": (64, {}),
    "sequencer2d_s": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
    "visformer_tiny": (64, {"img_size": 64}),
    "shvit_s1": (64, {}),
    "repghostnet_050": (64, {}),
    "gernet_s": (64, {}),
    "mobileone_s0": (64, {}),
    "inception_next_atto": (64, {}),
}  # fmt: skip

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72}
TRANSFORMERS: dict[str, tuple[int, dict[str, Any]]] = {
    "SegformerForSemanticSegmentation": (
        64, {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 40, 64), "decoder_hidden_size": 48}),
    "MobileViTForSemanticSegmentation": (
        64, {"hidden_sizes": (24, 32, 40), "neck_hidden_sizes": (8, 12, 16, 24, 32, 40, 56)}),
    "ConvNextV2ForImageClassification": (64, {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 24, 32, 40)}),
    "Dinov2ForImageClassification": (56, {**TINY, "use_swiglu_ffn": True}),
    "CLIPVisionModel": (64, {**TINY, "patch_size": 16}),
    "SiglipVisionModel": (64, {**TINY, "patch_size": 16}),
    "YolosForObjectDetection": (64, {**TINY, "image_size": (64, 64), "num_detection_tokens": 7}),
    "Swinv2ForImageClassification": (64, {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 3), "window_size": 4}),
    "DPTForDepthEstimation": (
        64, {**TINY, "num_hidden_layers": 4, "backbone_out_indices": (0, 1, 2, 3),
             "neck_hidden_sizes": (16, 24, 32, 40), "fusion_hidden_size": 24, "patch_size": 16, "is_hybrid": False}),
    "UperNetForSemanticSegmentation": (
        192, {"backbone_config": transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40],
             out_features=["stage1", "stage2", "stage3", "stage4"]), "hidden_size": 32, "use_auxiliary_head": False}),
    "PoolFormerForImageClassification": (64, {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 24, 32, 40)}),
    "ViTMSNForImageClassification": (64, {**TINY, "patch_size": 16}),
    "BitForImageClassification": (
        64, {"depths": (1, 1, 1, 1), "embedding_size": 16, "hidden_sizes": (32, 64, 64, 96), "num_groups": 8}),
    "GLPNForDepthEstimation": (
        64, {"depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 40, 64), "decoder_hidden_size": 24}),
    "Swin2SRForImageSuperResolution": (32, {"embed_dim": 24, "depths": (2,), "num_heads": (3,), "window_size": 8}),
}  # fmt: skip


# Detection and audio models that need more than one row ---------------------------------------------------------------


def detr() -> Export:
    """DETR over a small ResNet, its mask made inside."""
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=48,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=72,
        decoder_ffn_dim=72, num_queries=7, attn_implementation="eager",
    )  # fmt: skip
    return image(First(transformers.DetrForObjectDetection(config)))


def mlp(block: type[nn.Module], **options: Any) -> Export:
    """timm's MLP-Mixer with one of its blocks."""
    return image(
        timm.models.mlp_mixer.MlpMixer(
            num_classes=7, img_size=64, patch_size=16, num_blocks=2, embed_dim=48, block_layer=block, **options
        )
    )


def video() -> Export:
    """VideoMAE over four frames."""
    config = transformers.VideoMAEConfig(**TINY, num_frames=4, image_size=32, patch_size=16)
    config._attn_implementation = "eager"
    return Export(
        First(transformers.VideoMAEModel(config)), {"frames": torch.randn(2, 4, 3, 32, 32)}, {"frames": BATCH}
    )


def sam_encoder() -> Export:
    """SAM's image encoder: window attention with relative positions by Einsum."""
    config = transformers.SamVisionConfig(
        hidden_size=48, output_channels=24, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=8,
        window_size=3, global_attn_indexes=[1], mlp_dim=72, initializer_range=0.02,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return image(First(transformers.SamVisionModel(config)))


def sound(model: nn.Module, shape: tuple[int, ...], axes: Mapping[int, str]) -> Export:
    """A model over a signal or its spectrum."""
    return Export(model, {"signal": torch.randn(2, *shape)}, {"signal": axes})


SPEECH = {**TINY, "conv_dim": (16, 16, 24), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
          "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
WHISPER = {"d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 72, "num_mel_bins": 16,
           "max_source_positions": 30}  # fmt: skip


def speech(name: str, **options: Any) -> Export:
    """wav2vec 2.0 and its relatives over raw audio."""
    made = getattr(transformers, name)
    config = made.config_class(**SPEECH, **options)
    config._attn_implementation = "eager"
    return sound(First(made(config)), (800,), BATCH)


def whisper_encoder() -> Export:
    """Whisper's encoder over a log-mel spectrum."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(**WHISPER)
    config._attn_implementation = "eager"
    return sound(First(WhisperEncoder(config)), (16, 60), BATCH)


def spectrogram_transformer() -> Export:
    """Audio spectrogram transformer: overlapping patches of time and frequency."""
    config = transformers.ASTConfig(**TINY, max_length=48, num_mel_bins=32)
    config._attn_implementation = "eager"
    return sound(First(transformers.ASTForAudioClassification(config)), (48, 32), BATCH)


def encodec_encoder() -> Export:
    """Encodec's encoder: padded causal convolutions with weight norm, residual blocks and an LSTM."""
    config = transformers.EncodecConfig(num_filters=8, hidden_size=24, upsampling_ratios=[4, 2], num_lstm_layers=2)
    return sound(transformers.EncodecModel(config).encoder, (1, 320), BATCH)


# By hand --------------------------------------------------------------------------------------------------------------


def conv(
    inside: int, outside: int, kernel: int = 3, stride: int = 1, act: Callable[[], nn.Module] = nn.SiLU, **options: Any
) -> nn.Sequential:
    """Conv, BatchNorm, activation, as detectors write it."""
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outside), act())


class C2f(nn.Module):
    """Split, a chain of residual bottlenecks, everything concatenated."""

    def __init__(self, inside: int, outside: int, depth: int) -> None:
        super().__init__()
        self.half = outside // 2
        self.first, self.last = conv(inside, 2 * self.half, 1), conv((2 + depth) * self.half, outside, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(self.half, self.half), conv(self.half, self.half)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features."""
        pieces = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            pieces.append(pieces[-1] + block(pieces[-1]))
        return self.last(torch.cat(pieces, 1))


class SPPF(nn.Module):
    """Three poolings in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, width // 2, 1), conv(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features."""
        pieces = [self.first(x)]
        for _ in range(3):
            pieces.append(F.max_pool2d(pieces[-1], 5, 1, 2))
        return self.last(torch.cat(pieces, 1))


class Yolo8(nn.Module):
    """Backbone, path aggregation, decoupled heads with distribution focal loss, boxes decoded."""

    def __init__(self, width: int = 16, classes: int = 5, bins: int = 8) -> None:
        super().__init__()
        w, self.bins, self.classes = width, bins, classes
        self.stem = nn.Sequential(conv(3, w, 3, 2), conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1))
        self.two, self.three = (
            nn.Sequential(conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2)),
            nn.Sequential(conv(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 1), SPPF(8 * w)),
        )
        self.up, self.down = C2f(12 * w, 4 * w, 1), C2f(12 * w, 8 * w, 1)
        self.stride = conv(4 * w, 4 * w, 3, 2)
        self.boxes = nn.ModuleList(self.head(c, w, 4 * bins) for c in (4 * w, 8 * w))
        self.scores = nn.ModuleList(self.head(c, w, classes) for c in (4 * w, 8 * w))
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)
        self.dfl.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)

    @staticmethod
    def head(inside: int, width: int, outside: int) -> nn.Sequential:
        """Two convolutions and a projection."""
        return nn.Sequential(conv(inside, width), conv(width, width), nn.Conv2d(width, outside, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 4 + classes, cells]."""
        two = self.two(self.stem(x))
        three = self.three(two)
        two = self.up(torch.cat([F.interpolate(three, scale_factor=2.0, mode="nearest"), two], 1))
        three = self.down(torch.cat([self.stride(two), three], 1))
        levels = [
            torch.cat([b(f), s(f)], 1).flatten(2) for f, b, s in zip((two, three), self.boxes, self.scores, strict=True)
        ]
        box, score = torch.cat(levels, 2).split((4 * self.bins, self.classes), 1)
        n, _, cells = box.shape
        box = self.dfl(box.view(n, 4, self.bins, cells).transpose(2, 1).softmax(1)).view(n, 4, cells)
        low, high = box.chunk(2, 1)
        return torch.cat([(high - low) / 2, low + high, score.sigmoid()], 1)


class Yolo5(nn.Module):
    """Cross-stage blocks and an anchor head reshaped to five axes."""

    def __init__(self, width: int = 16, classes: int = 5, anchors: int = 3) -> None:
        super().__init__()
        w, self.anchors, self.outputs = width, anchors, 5 + classes
        self.stem = nn.Sequential(conv(3, w, 6, 2), conv(w, 2 * w, 3, 2))
        self.left, self.right, self.merge = conv(2 * w, w, 1), conv(2 * w, w, 1), conv(2 * w, 2 * w, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(w, w, 1), conv(w, w)) for _ in range(2))
        self.pool = SPPF(2 * w)
        self.head = nn.Conv2d(2 * w, anchors * self.outputs, 1)
        self.register_buffer("grid", torch.rand(anchors, 1, 1, 2) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, cells, 5 + classes]."""
        x = self.stem(x)
        left = self.left(x)
        for block in self.blocks:
            left = left + block(left)
        x = self.head(self.pool(self.merge(torch.cat([left, self.right(x)], 1))))
        n, _, h, w = x.shape
        x = x.view(n, self.anchors, self.outputs, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
        place, size, rest = x.split((2, 2, self.outputs - 4), 4)
        return torch.cat([place * 2 - 0.5, (size * 2) ** 2 * self.grid, rest], 4).view(n, -1, self.outputs)


class DiffusionResidual(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the time added between."""

    def __init__(self, inside: int, outside: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inside), nn.GroupNorm(groups, outside)
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Features."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class DiffusionAttention(nn.Module):
    """GroupNorm, self- and cross-attention over space, gated feed-forward, residual."""

    def __init__(self, width: int, heads: int, context: int, groups: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, width)
        self.inside, self.outside = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q, self.out = (nn.ModuleList(nn.Linear(width, width, bias=b) for _ in range(2)) for b in (False, True))
        self.k, self.v = (nn.ModuleList(nn.Linear(c, width, bias=False) for c in (width, context)) for _ in range(2))
        self.gate, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def attend(self, k: int, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Scaled dot product attention."""
        q, key, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q[k](x), self.k[k](source), self.v[k](source))
        )
        return self.out[k](F.scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Features."""
        n, c, h, w = x.shape
        y = self.inside(self.norm(x)).reshape(n, c, h * w).transpose(1, 2)
        z = self.norms[0](y)
        y = y + self.attend(0, z, z)
        y = y + self.attend(1, self.norms[1](y), context)
        a, b = self.gate(self.norms[2](y)).chunk(2, -1)
        y = y + self.down(a * F.gelu(b))
        return x + self.outside(y.transpose(1, 2).reshape(n, c, h, w))


class DiffusionUNet(nn.Module):
    """Two levels of a latent-diffusion U-Net."""

    def __init__(self, width: int = 32, groups: int = 8, context: int = 24, time: int = 40) -> None:
        super().__init__()
        w = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.width = width
        self.first, self.last = nn.Conv2d(4, w, 3, padding=1), nn.Conv2d(w, 4, 3, padding=1)
        pairs = ((w, w), (w, 2 * w), (2 * w, 2 * w), (4 * w, 2 * w), (3 * w, w))
        self.blocks = nn.ModuleList(DiffusionResidual(a, b, time, groups) for a, b in pairs)
        self.attention = nn.ModuleList(DiffusionAttention(2 * w, 4, context, groups) for _ in range(3))
        self.down, self.up = nn.Conv2d(w, w, 3, 2, 1), nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.norm = nn.GroupNorm(groups, w)

    def forward(self, latent: torch.Tensor, step: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """float32[n, 4, h, w] of the latent's shape."""
        angle = step[:, None] * torch.exp(-torch.arange(self.width // 2) / self.width)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        one = self.blocks[0](self.first(latent), time)
        two = self.attention[0](self.blocks[1](self.down(one), time), context)
        x = self.attention[1](self.blocks[2](two, time), context)
        x = self.attention[2](self.blocks[3](torch.cat([x, two], 1), time), context)
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.norm(self.blocks[4](torch.cat([x, one], 1), time))))


def diffusion(axes: Mapping[int, str]) -> Export:
    """Latent, time step and text."""
    args = {"latent": torch.randn(2, 4, 16, 16), "step": torch.rand(2), "context": torch.randn(2, 5, 24)}
    return Export(DiffusionUNet(), args, {"latent": axes, "step": BATCH, "context": BATCH})


class Autoencoder(nn.Module):
    """The decoder of a latent autoencoder: GroupNorm blocks and single-head attention over space."""

    def __init__(self, width: int = 32, groups: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(groups, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )
        self.block = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image of twice the size."""
        x = self.first(x)
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3 * c, h * w).chunk(3, 1)
        weight = torch.softmax(q.transpose(1, 2) @ k * c**-0.5, -1)
        x = x + self.out((v @ weight.transpose(1, 2)).reshape(n, c, h, w))
        return self.last(F.interpolate(x + self.block(x), scale_factor=2.0))


class Recurrent(nn.Module):
    """A stacked LSTM or GRU with a classifier over all steps."""

    def __init__(self, kind: type[nn.RNNBase], both: bool, layers: int = 2) -> None:
        super().__init__()
        self.body = kind(16, 24, layers, batch_first=True, bidirectional=both)
        self.head = nn.Sequential(nn.Linear(24 * (1 + both), 20), nn.ReLU(), nn.Linear(20, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, t, 7]."""
        return self.head(self.body(x)[0])


class CRNN(nn.Module):
    """Convolutions, columns read by a bidirectional LSTM, as in text recognition."""

    def __init__(self) -> None:
        super().__init__()
        pool = partial(nn.MaxPool2d, 2)
        self.body = nn.Sequential(
            conv(1, 16, act=nn.ReLU), pool(), conv(16, 24, act=nn.ReLU), pool(), conv(24, 32, act=nn.ReLU)
        )
        self.rnn = nn.LSTM(32 * 4, 24, 2, bidirectional=True)
        self.head = nn.Linear(48, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[t, n, 11]."""
        x = self.body(x)
        return self.head(self.rnn(x.flatten(1, 2).permute(2, 0, 1))[0]).log_softmax(-1)


class TCN(nn.Module):
    """Dilated causal convolutions with weight norm, cut at the end and added."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 24, 1)
        self.layers = nn.ModuleList(norm(nn.Conv1d(24, 24, 3, padding=2 * d, dilation=d)) for d in (1, 2, 4))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 5]."""
        x = self.first(x)
        for layer in self.layers:
            x = x + F.relu(layer(x)[..., : x.shape[-1]])
        return self.head(x[..., -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions conditioned by a slice of one projection, as in WaveNet and VITS."""

    def __init__(self, width: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Conv1d(8, width, 1), nn.Conv1d(width, 6, 1)
        self.condition = nn.Conv1d(5, 2 * width * layers, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=2**k, dilation=2**k) for k in range(layers))
        self.sides = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(layers))

    def forward(self, signal: torch.Tensor, speaker: torch.Tensor) -> torch.Tensor:
        """float32[n, 6, t]."""
        x, total, w = self.first(signal), 0, self.width
        side = self.condition(speaker[:, :, None])
        for k, (layer, out) in enumerate(zip(self.layers, self.sides, strict=True)):
            y = layer(x) + side[:, 2 * w * k : 2 * w * (k + 1)]
            y = out(torch.tanh(y[:, :w]) * torch.sigmoid(y[:, w:]))
            x, total = x + y[:, :w], total + y[:, w:]
        return self.last(F.relu(total))


class Vocoder(nn.Module):
    """HiFi-GAN-like: transposed convolutions, parallel residual blocks that are averaged, weight norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.first, self.last = norm(nn.Conv1d(8, 32, 7, padding=3)), norm(nn.Conv1d(8, 1, 7, padding=3))
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(a, a // 2, 4, 2, 1)) for a in (32, 16))
        self.blocks = nn.ModuleList(
            nn.ModuleList(norm(nn.Conv1d(c, c, k, padding=k // 2)) for k in (3, 7)) for c in (16, 8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 1, 4 t]."""
        x = self.first(x)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(x + block(F.leaky_relu(x, 0.1)) for block in blocks) / len(blocks)
        return torch.tanh(self.last(F.leaky_relu(x)))


class SuperResolution(nn.Module):
    """Residual channel attention and PixelShuffle, image size dynamic."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, width, 1), nn.Sigmoid()
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image of twice the size."""
        x = self.first(x)
        y = self.body(x)
        return self.last(self.up(x + y * self.gate(y)))


class Maxout(nn.Module):
    """Maxima over pairs of channels, then gates by GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 7]."""
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c // 2, 2, h, w).amax(2)
        left, right = self.b(x).chunk(2, 1)
        x = F.glu(self.c(torch.maximum(left, right)).repeat(1, 2, 1, 1), 1)
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """Depthwise multiplier, grouped convolution, channel shuffle, gates from the other half, batch-free norm."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.deep = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.grouped, self.norm = nn.Conv2d(24, 36, 1, groups=groups), nn.InstanceNorm2d(36, affine=True)
        self.wide, self.last = nn.Conv2d(36, 72, 1), nn.Conv2d(36, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 7]."""
        x = self.norm(self.grouped(F.hardswish(self.deep(self.first(x)))))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        value, gate = self.wide(x).chunk(2, 1)
        return self.last(value * torch.sigmoid(gate)).mean((2, 3))


class Standardised(nn.Conv2d):
    """Convolution with a standardised weight, as in BiT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features."""
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def standardised() -> nn.Module:
    """Standardised convolutions, GroupNorm with as many groups as fit, and one group for all."""
    return nn.Sequential(
        Standardised(3, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), Standardised(24, 40, 3, 2, 1),
        nn.GroupNorm(1, 40), nn.ReLU(), nn.Conv2d(40, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def volume() -> nn.Module:
    """A 3-D convolutional network, factorised in space and time, with pooling and a classifier."""
    return nn.Sequential(
        nn.Conv3d(2, 16, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 24, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(24, 32, 3, padding=1, groups=2), nn.InstanceNorm3d(32, affine=True), nn.ELU(),
        nn.ConvTranspose3d(32, 16, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class Segmentation(nn.Module):
    """Atrous pyramid over a ResNet with dilation, skip from an early stage, bilinear upsampling, as DeepLab v3+."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        block = torchvision.models.resnet.Bottleneck
        net = torchvision.models.ResNet(
            block, [1, 1, 1, 1], width_per_group=16, replace_stride_with_dilation=[False, True, True]
        )
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
        self.rest = nn.Sequential(net.layer2, net.layer3, net.layer4)
        self.pyramid = nn.ModuleList(
            [conv(2048, width, 1, act=nn.ReLU)]
            + [nn.Sequential(nn.Conv2d(2048, width, 3, padding=d, dilation=d), nn.ReLU()) for d in (2, 4)]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2048, width, 1), nn.ReLU())
        self.merge, self.skip, self.last = (
            conv(4 * width, width, 1),
            conv(256, 12, 1),
            nn.Conv2d(width + 12, 6, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 6, h, w]."""
        early = self.stem(x)
        late = self.rest(early)
        pieces = [branch(late) for branch in self.pyramid]
        pieces.append(F.interpolate(self.pooled(late), size=late.shape[-2:], mode="bilinear", align_corners=False))
        y = F.interpolate(self.merge(torch.cat(pieces, 1)), size=early.shape[-2:], mode="bilinear", align_corners=False)
        y = self.last(torch.cat([y, self.skip(early)], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Feature pyramid with one head shared by all levels, as RetinaNet."""

    def __init__(self, width: int = 24, classes: int = 5, anchors: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.stages = nn.ModuleList(conv(a, b, 3, 2, nn.ReLU) for a, b in ((3, 16), (16, 32), (32, 48)))
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (32, 48))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
        self.score = nn.Conv2d(width, anchors * classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, cells * anchors, classes]."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        high = self.lateral[1](features[2])
        low = self.lateral[0](features[1]) + F.interpolate(high, size=features[1].shape[-2:])
        levels = [self.score(self.tower(s(f))) for s, f in zip(self.smooth, (low, high), strict=True)]
        return torch.cat([y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, self.classes) for y in levels], 1)


class MultiHead(nn.Module):
    """nn.TransformerEncoderLayer over patches, sequence first: heads merged into the batch."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.place = nn.Parameter(torch.randn(64, 1, width) * 0.02)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 4) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 72), nn.ReLU(), nn.Linear(72, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[n, 7]."""
        x = self.patch(x).flatten(2).permute(2, 0, 1) + self.place
        for k in range(2):
            y = self.norm[2 * k](x)
            x = x + self.attention[k](y, y, y)[0]
            x = x + self.feed[k](self.norm[2 * k + 1](x))
        return self.head(x.mean(0))


HAND: dict[str, Callable[[], Export]] = {
    "detr": detr,
    "sam_encoder": sam_encoder,
    "wav2vec2": lambda: speech("Wav2Vec2ForCTC"),
    "wav2vec2_stable": lambda: speech("Wav2Vec2ForCTC", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "hubert": lambda: speech("HubertModel"),
    "whisper_encoder": whisper_encoder,
    "ast": spectrogram_transformer,
    "encodec_encoder": encodec_encoder,
    "yolo8": lambda: image(Yolo8()),
    "yolo8_dynamic": lambda: image(Yolo8(), axes=SIZES),
    "yolo5": lambda: image(Yolo5()),
    "diffusion_unet": lambda: diffusion(BATCH),
    "diffusion_unet_dynamic": lambda: diffusion(SIZES),
    "autoencoder": lambda: image(Autoencoder(), 16, SIZES, 4),
    "lstm": lambda: sound(Recurrent(nn.LSTM, False), (11, 16), {0: "batch", 1: "length"}),
    "bilstm": lambda: sound(Recurrent(nn.LSTM, True), (11, 16), BATCH),
    "gru": lambda: sound(Recurrent(nn.GRU, False), (11, 16), BATCH),
    "bigru": lambda: sound(Recurrent(nn.GRU, True, 1), (11, 16), BATCH),
    "crnn": lambda: Export(CRNN(), {"image": torch.randn(2, 1, 16, 64)}, {"image": {0: "batch", 3: "width"}}),
    "tcn": lambda: sound(TCN(lambda layer: layer), (8, 32), BATCH_AND_LENGTH),
    "tcn_weight_norm": lambda: sound(TCN(nn.utils.parametrizations.weight_norm), (8, 32), BATCH),
    "wavenet": lambda: Export(
        WaveNet(), {"signal": torch.randn(2, 8, 40), "speaker": torch.randn(2, 5)},
        {"signal": BATCH_AND_LENGTH, "speaker": BATCH}),
    "vocoder": lambda: sound(Vocoder(), (8, 20), BATCH_AND_LENGTH),
    "super_resolution": lambda: image(SuperResolution(), 24, SIZES),
    "maxout": lambda: image(Maxout(), 16),
    "mixed": lambda: image(Mixed(), 16, SIZES),
    "standardised": lambda: image(standardised(), 16),
    "volume": lambda: Export(volume(), {"image": torch.randn(2, 2, 8, 16, 16)}, {"image": BATCH}),
    "segmentation": lambda: image(Segmentation(), axes=SIZES),
    "pyramid": lambda: image(Pyramid(), axes=SIZES),
    "multi_head": lambda: image(MultiHead()),
    "resnext_grouped": lambda: image(
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4),
        axes=SIZES),
    "vgg": lambda: image(
        nn.Sequential(torchvision.models.vgg.make_layers([16, "M", 24, 24, "M", 32, "M"], batch_norm=True),
                      nn.Flatten(),
                      nn.Linear(32 * 64, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 7))),
    "densenet": lambda: image(torchvision.models.DenseNet(8, (3, 2, 2), 16, num_classes=7)),
    "mixer": lambda: mlp(timm.models.mlp_mixer.MixerBlock),
    "gmlp": lambda: mlp(timm.models.mlp_mixer.SpatialGatingBlock, mlp_ratio=6, mlp_layer=timm.layers.GatedMlp),
    "resmlp": lambda: mlp(timm.models.mlp_mixer.ResBlock, mlp_ratio=4, norm_layer=timm.models.mlp_mixer.Affine),
    "convmixer": lambda: image(timm.models.convmixer.ConvMixer(48, 2, num_classes=7)),
    "video": video,
    "focalnet": lambda: image(timm.models.focalnet.FocalNet(depths=(1, 1), embed_dim=24, num_classes=7)),
    "vit_torchvision": lambda: image(
        torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 72, num_classes=7)),
    "swin_torchvision": lambda: image(
        torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 3], [4, 4], num_classes=7)),
    "maxvit_torchvision": lambda: image(
        torchvision.models.MaxVit((64, 64), 16, 4, [16, 24], [1, 1], 8, 0.0, num_classes=7)),
    "convnext_torchvision": lambda: image(torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(24, 40, 1), torchvision.models.convnext.CNBlockConfig(40, None, 1)],
        num_classes=7)),
}  # fmt: skip

MODELS: dict[str, Callable[[], Export]] = {
    **{name: partial(from_torchvision, name, *row) for name, row in TORCHVISION.items()},
    **{f"timm_{name}": partial(from_timm, name, *row) for name, row in TIMM.items()},
    **{f"hf_{name}": partial(from_transformers, name, *row) for name, row in TRANSFORMERS.items()},
    **HAND,
}
