"""Train a digit classifier under group lasso, so that whole filters and neurons end at zero, and export it to ONNX.

Run as `python models/train_lasso.py`. After every step of the optimizer each group is shrunk towards zero by the
proximal step of its norm; groups that reach zero stay in the file, for `onnxprune realize` to take out. A filter goes
with its gain and shift of the normalisation after it; a neuron's bias is not in its group and stays.
"""

from pathlib import Path

import torch
from digits_data import distort, load_split
from digits_networks import CLASSES, ResidualBlock, convolution
from torch import Tensor, nn
from torch.nn import functional
from train_digits import check, export, run

FOLDER = Path(__file__).parent
SEED = 0
BATCH = 64
EPOCHS = 60
RATE = 0.05
STRENGTH = 0.01


class LassoCNN(nn.Module):
    """Stem of 32 channels, a residual block of 32, a 3x3 convolution to 64, and a hidden layer of 96 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(1, 32, 3, 1), nn.ReLU())
        self.block = ResidualBlock(32, 32, 1)
        self.reduce = nn.Sequential(*convolution(32, 64, 3, 2), nn.ReLU())
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, CLASSES)
        )

    def forward(self, image: Tensor) -> Tensor:
        """float32[n, 1, 8, 8] -> logits float32[n, 10]."""
        return self.head(self.reduce(self.block(self.stem(image))))

    def groups(self) -> list[list[Tensor]]:
        """Tensors whose slices along axis 0 are shrunk together, of every width that is free to shrink."""
        return [
            [self.block.body[0].weight, self.block.body[1].weight, self.block.body[1].bias],
            [self.reduce[0].weight, self.reduce[1].weight, self.reduce[1].bias],
            [self.head[2].weight],
        ]


@torch.no_grad()
def shrink(group: list[Tensor], step: float) -> None:
    """Proximal step of `step * sqrt(size) * norm` for each slice: x <- max(0, 1 - step * sqrt(size) / |x|) x."""
    flat = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in group]
    norm = torch.cat(flat, dim=1).norm(dim=1)
    size = sum(part.shape[1] for part in flat)
    factor = (1 - step * size**0.5 / norm.clamp(min=1e-12)).clamp(min=0)
    for tensor in group:
        tensor.mul_(factor.reshape(-1, *(1,) * (tensor.ndim - 1)))


def train(images: Tensor, labels: Tensor) -> LassoCNN:
    """SGD with momentum along a falling line, a proximal step after each."""
    torch.manual_seed(SEED)
    network = LassoCNN().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
    for epoch in range(EPOCHS):
        rate = RATE * (1 - epoch / EPOCHS)
        optimizer.param_groups[0]["lr"] = rate
        order = torch.randperm(len(images))
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(network(distort(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for group in network.groups():
                shrink(group, rate * STRENGTH)
    return network.eval()


def main() -> None:
    """Train, export, check, and count what is at zero."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_images, heldout_images, train_labels, heldout_labels = load_split()
    network = train(torch.from_numpy(train_images), torch.from_numpy(train_labels))
    path = FOLDER / "digits_lasso.onnx"
    export(network, path, dynamo=False)
    check(network, path, heldout_images)
    right = int((run(path, heldout_images).argmax(axis=1) == heldout_labels).sum())
    dead = [int((group[0].flatten(1).norm(dim=1) == 0).sum()) for group in network.groups()]
    sizes = [len(group[0]) for group in network.groups()]
    print(f"{path.name}: {right} of {len(heldout_labels)} held-out images right, {dead} of {sizes} units at zero, "
          f"{path.stat().st_size} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
