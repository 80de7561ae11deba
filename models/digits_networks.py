"""Two small classifiers of 8x8 digits: a residual CNN and a vision transformer."""

import torch
from torch import Tensor, nn

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3x3 Conv+BN and a skip, which is the input itself or, where the shape changes, a 1x1 Conv+BN of it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            *convolution(outputs, outputs, 3, 1),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, image: Tensor) -> Tensor:
        """float32[n, inputs, h, w] -> float32[n, outputs, h / stride, w / stride]."""
        return torch.relu(self.body(image) + self.skip(image))


class DigitsCNN(nn.Module):
    """Stem; of the three widths, 1 block at 8x8, 2 at 4x4 and 2 at 2x2; average pool; linear."""

    def __init__(self, widths: tuple[int, int, int] = (32, 48, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(*convolution(1, first, 3, 1), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(first, first, 1),
            ResidualBlock(first, second, 2),
            ResidualBlock(second, second, 1),
            ResidualBlock(second, third, 2),
            ResidualBlock(third, third, 1),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        """float32[n, 1, 8, 8] -> logits float32[n, 10]."""
        return self.head(self.blocks(self.stem(image)))


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the size at stride 1, and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Attention(nn.Module):
    """Multi-head self-attention, spelled out as MatMul and Softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """float32[n, s, width] -> float32[n, s, width]."""
        query, key, value = (self.split(layer(tokens)) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(-1, -2) * self.scale, dim=-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))

    def split(self, tokens: Tensor) -> Tensor:
        """float32[n, s, (heads d)] -> float32[n, heads, s, d]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-LN attention and a GELU feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """float32[n, s, width] -> float32[n, s, width]."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.feedforward(self.feedforward_norm(tokens))


class DigitsViT(nn.Module):
    """16 patches of 2x2 and a class token, width 96; 4 blocks of 6 heads and 192 hidden units; linear."""

    def __init__(self, width: int = 96, heads: int = 6, hidden: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """float32[n, 1, 8, 8] -> logits float32[n, 10]."""
        patches = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(image.shape[0], -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])
