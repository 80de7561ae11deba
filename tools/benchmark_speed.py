"""Speed at equal MACs, ours and others': python tools/benchmark_speed.py FOLDER [NAME...] [--shares 0.7,0.5,0.3].

Exports the architectures of exports/standard.py with random weights, brings each to shares of its MACs (counted by
onnxprune) by us, by Torch-Pruning (as it is, and with round_to=8; exported alike) and by onnxsim, and measures all of
them in one interleaved run on one thread. Other names are folders of ONNXPRUNE_ZOO, `zoo` is all of them: trained
models, which Torch-Pruning cannot read. Efficiency is the MACs ratio over the latency ratio. Prints Markdown, and what
libraries say on stderr. A peer that fails has its reason in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxsim
import torch
import torch_pruning as tp
from exports.standard import ARCHITECTURES, write
from peers import bisect, count_macs
from torch import nn

import onnxprune
from onnxprune import measure, verbs

Arm = Callable[[Path, float, Path], Path]  # (dense model, share of its MACs, where to) -> the pruned model


def ours(dense: Path, share: float, target: Path) -> Path:
    """The default without data."""
    onnxprune.prune(dense, target, target={"macs": share}, measure=False, force=True)
    return target


def by_onnxsim(dense: Path, share: float, target: Path) -> Path:
    """Structured pruning by the second norm, the same share of every layer."""
    model = onnx.load(dense)

    def make(ratio: float) -> onnx.ModelProto:
        return onnxsim.apply_structured_pruning(model, sparsity=ratio, global_sparsity=False)

    def count(pruned: onnx.ModelProto) -> float:
        onnx.save(pruned, target)
        return count_macs(target)

    onnx.save(bisect(make, count, share * count_macs(dense)), target)
    return target


def by_torch_pruning(name: str, round_to: int | None) -> Arm:
    """Group magnitudes, the same share of every layer but the classifier; heads keep their number.

    Its own count of MACs, which leaves out the attention products, guides the bisection.
    """

    def arm(dense: Path, share: float, target: Path) -> Path:
        architecture = ARCHITECTURES[name]

        inputs: Any = dict(zip(architecture.names, architecture.args, strict=True))
        inputs = inputs if len(inputs) > 1 else architecture.args[0]

        def make(ratio: float) -> nn.Module:
            torch.manual_seed(0)
            module = architecture.build(False).eval()
            attentions = [m for m in module.modules() if hasattr(m, "query") and hasattr(m, "num_attention_heads")]
            heads = {layer: m.num_attention_heads for m in attentions for layer in (m.query, m.key, m.value)}
            last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1:]
            pruner = tp.pruner.BasePruner(
                module,
                inputs,
                tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                round_to=round_to,
                num_heads=heads,
                ignored_layers=last,
            )
            pruner.step()
            for m in attentions:
                m.num_attention_heads = pruner.num_heads[m.query]
                m.all_head_size = m.query.out_features
                m.attention_head_size = m.query.out_features // m.num_attention_heads
            return module

        def count(module: nn.Module) -> float:
            return float(tp.utils.count_ops_and_params(module, inputs)[0])

        whole = count(architecture.build(False).eval())
        return write(bisect(make, count, share * whole), name, target)

    return arm


def networks(names: list[str], folder: Path) -> Iterator[tuple[str, Path, dict[str, Arm]]]:
    """(name, dense model, what prunes it) for each name."""
    zoo = Path(os.environ.get("ONNXPRUNE_ZOO", ""))
    for name in names:
        if name in ARCHITECTURES:
            torch.manual_seed(0)
            dense = write(ARCHITECTURES[name].build(False).eval(), name, folder / f"{name}.onnx")
            peers = {
                "Torch-Pruning": by_torch_pruning(name, None),
                "Torch-Pruning, round_to=8": by_torch_pruning(name, 8),
            }
            yield name, dense, {"onnxprune": ours, **peers, "onnxsim": by_onnxsim}
            continue
        for dense in sorted(zoo.glob("*/*.onnx" if name == "zoo" else f"{name}/*.onnx")):
            yield f"{dense.parent.name}/{dense.stem}", dense, {"onnxprune": ours, "onnxsim": by_onnxsim}


def timed(paths: list[Path], rounds: int, seconds: float) -> list[measure.Latency]:
    """Latency of models of one interface, interleaved."""
    return verbs.measure_models([str(path) for path in paths], {}, "cpu", 1, rounds, seconds)


def rows(name: str, dense: Path, arms: dict[str, Arm], shares: list[float], folder: Path, most: float) -> Iterator[str]:
    """The table of one network."""
    whole = count_macs(dense)
    for share in shares:
        made: dict[str, Path] = {}
        for k, (arm, prune) in enumerate(arms.items()):
            try:
                path = prune(dense, share, folder / f"{name.replace('/', '_')}_{share}_{k}.onnx")
                timed([path], 1, 1.0)
            except Exception as error:  # a peer's own failure, or that of what it wrote, is a result too
                text = str(getattr(error, "message", error)).strip() or type(error).__name__
                reason = text.splitlines()[0][:100].replace("|", "/")
                yield f"| {name} | {share:g} | {arm} | {reason} | | | |"
            else:
                made[arm] = path
        found = timed([dense, *made.values()], 60, most)
        for (arm, path), row in zip(made.items(), found[1:], strict=True):
            macs, took = count_macs(path) / whole, row.ms / found[0].ms
            yield f"| {name} | {share:g} | {arm} | {macs:.3f} | {took:.3f} | {macs / took:.2f} | {row.spread:.1%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=["resnet50", "mobilenet_v2", "vit_b", "bert"])
    parser.add_argument("--shares", default="0.7,0.5,0.3")
    parser.add_argument("--by", default="", help="how the names of those begin that are to prune (all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each run of a dense model and all pruned ones")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    shares = [float(share) for share in given.shares.split(",")]
    print("| network | wanted | by | MACs ratio | latency ratio | efficiency | spread |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    out = sys.stdout
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, contextlib.redirect_stdout(sys.stderr):
        for name, dense, arms in networks(given.names, Path(folder)):
            some = {arm: prune for arm, prune in arms.items() if arm.startswith(given.by)}
            for row in rows(name, dense, some, shares, Path(folder), given.seconds):
                print(row, flush=True, file=out)


if __name__ == "__main__":
    main()
