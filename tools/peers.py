"""Other one-shot pruners on the digits networks, each brought to a number of MACs: Torch-Pruning and onnxsim.

Every peer has one ratio to turn. It is bisected until the MACs of the ONNX file, counted by onnxprune, are the wanted
ones. Peers that need gradients get the dense network's own answers on the calibration images as labels.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
import torch_pruning as tp
from digits import KINDS
from digits_networks import Attention
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from train_digits import export

from onnxprune import analysis, storage

TOLERANCE = 0.01  # of the wanted MACs
STEPS = 10


@dataclass(frozen=True)
class Case:
    """A trained network and what a pruner may look at: `images` float32[n, 1, 8, 8] without labels."""

    folder: Path
    network: str
    seed: int
    images: NDArray

    @property
    def dense(self) -> Path:
        """The file to prune."""
        return self.folder / f"{self.network}_{self.seed}.onnx"

    def module(self) -> nn.Module:
        """The same network in torch."""
        module = KINDS[self.network].network()
        module.load_state_dict(torch.load(self.dense.with_suffix(".pt"), weights_only=True))
        return module.eval()


Arm = Callable[[Case, float], dict[str, onnx.ModelProto]]


def count_macs(model: Path | onnx.ModelProto) -> int:
    """MACs for one image, as onnxprune counts them."""
    if isinstance(model, Path):
        return analysis.cost_of(storage.read_model(model)[0], {}, 0).macs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return count_macs(path)


def guess_macs(module: nn.Module) -> int:
    """The same number for a module of models/digits_networks.py, without an export; only the bisection relies on it."""
    found = []

    def layer(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.numel() // m.weight.shape[0] * m.weight.numel())

    def attention(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(inputs[0].shape[1] ** 2 * (m.query.out_features + m.value.out_features))

    hooks = [m.register_forward_hook(layer) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks += [m.register_forward_hook(attention) for m in module.modules() if isinstance(m, Attention)]
    with torch.no_grad():
        module(torch.zeros(1, 1, 8, 8))
    for hook in hooks:
        hook.remove()
    return sum(found)


def bisect(prune: Callable[[float], Any], count: Callable[[Any], int], wanted: float) -> Any:
    """What `prune(ratio)` gives at the ratio that comes nearest to the wanted MACs."""
    low, high = 0.0, 1.0
    best, best_gap, failure = None, float("inf"), None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        try:
            pruned = prune(ratio)
            macs = count(pruned)
        except Exception as error:  # whatever a peer raises where it would leave nothing
            high, failure = ratio, error
            continue
        gap = abs(macs - wanted)
        if gap < best_gap:
            best, best_gap = pruned, gap
        if gap <= TOLERANCE / 2 * wanted:
            break
        low, high = (ratio, high) if macs > wanted else (low, ratio)
    if best is None:
        raise RuntimeError(f"prunes at no ratio: {failure}") from failure
    return best


# Torch-Pruning --------------------------------------------------------------------------------------------------------

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
    "activation": tp.importance.ActivationImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "obdc": lambda: tp.importance.OBDCImportance(num_classes=10),
}

SCOPES = {"cnn": ("all", "inner"), "vit": ("all", "inner", "ffn")}


def kept_layers(module: nn.Module, scope: str) -> list[nn.Module]:
    """Layers whose outputs stay: the classifier, outside "all" also the writers of the residual stream.

    "inner" leaves the channels inside residual blocks, or the head dims and neurons; "ffn" the neurons alone.
    """
    layers = dict(module.named_modules())
    last = ("head", "head.2")
    stream = ("stem.0", "body.3", "skip.0", "patches", "attention.output", "feedforward.2")
    heads = ("attention.query", "attention.key", "attention.value")
    ends = {"all": last, "inner": last + stream, "ffn": last + stream + heads}[scope]
    return [m for name, m in layers.items() if name.endswith(ends) and isinstance(m, nn.Linear | nn.Conv2d)]


def make_pruner(module: nn.Module, importance: Any, scope: str, spread: str, ratio: float) -> tp.pruner.BasePruner:
    """Torch-Pruning's pruner for one step; heads keep their number and lose dimensions, its default."""
    heads = {
        layer: m.heads for m in module.modules() if isinstance(m, Attention) for layer in (m.query, m.key, m.value)
    }
    loose = [(p, 2) for name, p in module.named_parameters() if name in ("class_token", "positions")]
    return tp.pruner.BasePruner(
        module,
        torch.rand(2, 1, 8, 8),
        importance,
        pruning_ratio=ratio,
        global_pruning=spread == "global",
        ignored_layers=kept_layers(module, scope),
        num_heads=heads,
        unwrapped_parameters=loose,
    )


def prepare(module: nn.Module, importance: Any, images: Tensor) -> None:
    """Gradients or activations, where the importance needs them."""
    if isinstance(importance, tp.importance.ActivationImportance):
        with importance.compute_importance(module), torch.no_grad():
            module(images)
    if isinstance(importance, tp.importance.GroupTaylorImportance):
        logits = module(images)
        functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
    if isinstance(importance, tp.importance.GroupHessianImportance):
        for image in images.split(1):
            module.zero_grad()
            logits = module(image)
            functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
            importance.accumulate_grad(module)
    if isinstance(importance, tp.importance.OBDCImportance):
        pruner = make_pruner(module, importance, "all", "global", 0.5)
        rooted = pruner._downstream_node_as_root_if_attention  # of 1.6.1, gives None where there is no attention
        pruner._downstream_node_as_root_if_attention = lambda group: rooted(group) or group
        importance._prepare_model(module, pruner)
        logits = module(images)
        drawn = torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
        functional.cross_entropy(logits, drawn).backward()
        importance.step()
        importance._rm_hooks(module)


def cloned(module: nn.Module, importance: Any) -> tuple[nn.Module, Any]:
    """Both, independent of the originals; gradients too, which a deep copy of a parameter forgets."""
    pair = copy.deepcopy((module, importance))
    for old, new in zip(module.parameters(), pair[0].parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return pair


def to_onnx(module: nn.Module) -> onnx.ModelProto:
    """Exported as the dense one, BatchNormalization folded; the faster exporter for both networks."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(module, Path(folder) / "model.onnx", dynamo=False, fold=True)
        return onnx.load(Path(folder) / "model.onnx")


def estimate_norms(module: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose BatchNorm statistics are those of its own inputs."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        module.train()(images)
    return module.eval()


def torch_pruning(name: str, scope: str, spread: str, case: Case, wanted: float) -> dict[str, onnx.ModelProto]:
    """{suffix of the arm: model}: with BatchNorm as it is, and estimated again."""
    torch.manual_seed(case.seed)
    images = torch.from_numpy(case.images)
    module, importance = case.module(), IMPORTANCES[name]()
    prepare(module, importance, images)

    def pruned(ratio: float) -> nn.Module:
        torch.manual_seed(case.seed)
        smaller, own = cloned(module, importance)
        make_pruner(smaller, own, scope, spread, ratio).step()
        smaller.zero_grad()
        return smaller

    smaller = bisect(pruned, guess_macs, wanted)
    found = {"": to_onnx(smaller)}
    if case.network == "cnn":
        found["+bn"] = to_onnx(estimate_norms(smaller, images))
    return found


# onnxsim --------------------------------------------------------------------------------------------------------------


def onnxsim_pruning(criterion: str, spread: str, case: Case, wanted: float) -> dict[str, onnx.ModelProto]:
    """{suffix of the arm: model}: as pruned, and with its recovery, ridge for MatMul and BatchNorm for Conv."""
    dense = onnx.load(case.dense)
    feeds = [{"image": part} for part in np.array_split(case.images, 4)]

    def pruned(ratio: float) -> onnx.ModelProto:
        whole = {"sparsity": ratio, "global_sparsity": spread == "global"}
        if criterion == "l2":
            return onnxsim.apply_structured_pruning(dense, **whole)
        return onnxsim.apply_structured_wanda_pruning(dense, feeds, **whole)

    smaller = bisect(pruned, count_macs, wanted)
    found = {"": smaller, "+ridge": onnxsim.apply_pruning_finetune(dense, smaller, feeds)}
    if case.network == "cnn":
        found["+bn"] = onnxsim.recover_batch_norm(smaller, calibration_data=feeds, target_model=dense)
    return found


def arms(network: str) -> dict[str, Arm]:
    """All peers for one of the networks; an arm may give several models, told apart by a suffix."""
    found: dict[str, Arm] = {}
    for criterion in ("l2", "wanda"):
        for spread in ("uniform", "global"):
            found[f"onnxsim {criterion} {spread}"] = partial(onnxsim_pruning, criterion, spread)
    for name in IMPORTANCES:
        for scope in SCOPES[network]:
            for spread in ("uniform", "global"):
                found[f"tp {name} {scope} {spread}"] = partial(torch_pruning, name, scope, spread)
    return found
