"""The frame for repair: what stays is fitted, operator by operator, to what the dense model computes.

Sites are visited in topological order. Each is fitted on what the *pruned* model, repaired so far, feeds it, towards
what the dense model has in its place: errors are taken up where they arise instead of adding up. Producers are
fitted as well as consumers, and all operators of a residual sum together. How one site is fitted is a reconstructor's
business (passes/); the sampling of rows, the layouts and the order are the same for all of them. Everything that runs
the models does so in the child process (layerwise.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune import layerwise
from onnxprune.layerwise import Feeds, Repair
from onnxprune.model import Model, add_initializer, free_name
from onnxprune.operators import Slot, stored
from onnxprune.plugin import Reconstructor
from onnxprune.rows import Sampling
from onnxprune.running import BESIDE, MEMORY, Packed, memory_of, packed
from onnxprune.sites import Site
from onnxprune.storage import dump
from onnxprune.types import Array
from onnxprune.weights import Mapped, Shelf
from onnxprune.worker import Worker


def begin(
    worker: Worker,
    dense: Model,
    feeds: Feeds,
    sampling: Sampling,
    *,
    judged: Feeds = (),
    aside: Collection[str] = (),
    threads: int = 1,
    memory: int = MEMORY,
) -> None:
    """Hand the dense model to the child, with the samples to fit to, and those to judge by.

    Outputs in `aside` do not count where there are others. What takes more than `memory` bytes is run a few
    operators at a time, with values on disk. A site that takes more, or more than half of it where that is so, is
    fitted to fewer rows, or left alone.
    """
    with _sent(dense) as what:
        worker.call(layerwise.begin, what, list(feeds), list(judged), frozenset(aside), sampling, threads, memory)


def repair(
    worker: Worker,
    pruned: Model,
    sites: Sequence[Site],
    reconstructor: Reconstructor | None,
    *,
    start: Mapping[Slot, Array] | None = None,
    judge: bool = False,
    keep: bool = False,
    ridges: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Repair:
    """Fit every site of a pruned model in turn; see `begin`, which comes first.

    With `judge` its divergence from the dense model is measured instead of handing back what changed; with `keep` the
    dense side remembers its rows for the next plan. `start` are arrays that take the place of stored ones first,
    `ridges` dampings that were found before.

    Raises what Worker.call raises.
    """
    with _sent(pruned) as what:
        count: int = worker.call(layerwise.load, what, list(sites) if reconstructor else [], dict(start or {}), keep)
    for k in range(count):
        worker.call(layerwise.visit, k, reconstructor, dict(ridges or {}))
        progress(k + 1, count)
    if judge:
        judged: Repair = worker.call(layerwise.finish, judge)
        return judged
    shelf = Shelf()
    found: Repair = worker.call(layerwise.finish, judge, shelf.path)
    shelf.take(change for change in found.changes.values() if isinstance(change, Mapped))
    return found


@contextmanager
def _sent(model: Model) -> Iterator[str | Packed]:
    """A model as the child gets it: a large one by where its weights lie, another as a file, which is quicker there."""
    if memory_of(model) > BESIDE:
        yield packed(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        yield str(dump(model, folder, "model"))


def apply(model: Model, changes: Mapping[Slot, Array | Mapped]) -> list[str]:
    """Write a repair into the pruned model; the names of the initializers that changed.

    One that other nodes read as well stays for them, and a copy takes its place; readers of one initializer that are to
    read the same still share one.
    """
    graph = model.graph
    nodes = {str(node.outputs[0].name): node for node in graph}
    wanted: dict[str, list[tuple[ir.Tensor[Any], list[tuple[ir.Node, int]]]]] = {}
    for (reader, k), change in changes.items():
        value = stored(nodes[reader].inputs[k])
        assert value is not None and value.const_value is not None
        old, kind = value.const_value, value.const_value.dtype
        fresh = change if isinstance(change, Mapped) else ir.Tensor(np.ascontiguousarray(change, kind.numpy()), kind)
        if old.shape.numpy() == fresh.shape.numpy() and old.tobytes() == fresh.tobytes():
            continue
        rows = wanted.setdefault(str(value.name), [])
        same = next((uses for other, uses in rows if np.array_equal(other.numpy(), fresh.numpy())), None)
        if same is None:
            rows.append((fresh, [(nodes[reader], k)]))
        else:
            same.append((nodes[reader], k))
    names = []
    for name, rows in wanted.items():
        value = graph.initializers[name]
        free = not value.is_graph_output() and {(use.node, use.idx) for use in value.uses()} == {
            use for _, uses in rows for use in uses
        }
        for tensor, uses in rows:
            tensor.name = own = name if free else free_name(graph, name)
            shape = ir.Shape(tensor.shape.numpy())
            if free:
                value.const_value, value.shape, free = tensor, shape, False
            else:
                copy = ir.Value(name=own, shape=shape, type=value.type, const_value=tensor)
                add_initializer(graph, copy)
                for node, k in uses:
                    node.replace_input_with(k, copy)
            names.append(own)
    return sorted(names)
