"""Which sizes the dynamic dimensions of a model get while it is analysed, proven and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

import onnx_ir as ir

from onnxprune.infer import infer, names, symbols, true_inputs, walk

Sizes = dict[str, int]
Kind = tuple[str, tuple[int, ...]]  # batch, image or length; then what is fixed about its first place
Tables = Mapping[str, tuple[int, ...]]

# From the cheapest on: attention over every pixel grows with the fourth power of an image's side.
SCALES: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    {"image": ((32, 64), (64, 96)), "length": ((11, 13, 17), (19, 29, 37))},
    {"image": ((64, 96), (128, 160)), "length": ((64, 96, 160), (224, 288, 352))},
    {"image": ((224, 320), (256, 416)), "length": ((1024, 1536), (2560, 3072))},
    {"image": ((224, 224), (256, 256)), "length": ((16384,), (24576,))},
)
WRITTEN = 24  # sizes in a graph that are tried as lengths
SUMMANDS = 4  # lengths up to which sums are tried
BATCHES = (((3, 7, 11), (5, 13, 17)), ((1,), (1,)))  # some exports bake batch 1 in and still call it dynamic


def probes(model: ir.Model, given: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes for the dynamic dimensions at which the graph is consistent, or as nearly as can be found.

    Batches get small primes, so that they are never mistaken for a factor of something else; images get multiples
    of 32; other lengths get primes first, then what convolutions over long signals need. Sizes that depend on each
    other under names of their own are tried as equal, and as sums: a mask is as long as past and present together.
    `given` sizes stand in the first set.
    """
    dimensions = {name: _kind(model.graph, places) for name, places in symbols(model.graph).items()}
    best: tuple[int, Sizes, Sizes] | None = None
    for batches, scale in product(BATCHES, SCALES):
        tables = {"batch": batches, **scale}
        for relate in _dependences(dimensions):
            first, second = (relate({kind: table[k] for kind, table in tables.items()}) for k in (0, 1))
            first.update(given)
            problems = sum(len(infer(model, sizes).problems) for sizes in (first, second)) if dimensions else 0
            if best is None or problems < best[0]:
                best = (problems, first, second)
            if problems == 0:
                return first, second
    assert best is not None
    for sizes in _written_down(model, dimensions):
        sizes |= given
        if (problems := 2 * len(infer(model, sizes).problems)) < best[0]:
            best = (problems, sizes, sizes)
        if problems == 0:
            break
    return best[1], best[2]


def _dependences(dimensions: Mapping[str, Kind]) -> Iterable[Callable[[Tables], Sizes]]:
    """Ways to choose sizes: each by itself; one for each kind; one for each place, of which one is the sum of two."""

    def by(key: Callable[[str], Any]) -> Callable[[Tables], Sizes]:
        """Sizes from the tables, equal where `key` is; within a kind different ones as far as the tables go."""

        def choose(tables: Tables) -> Sizes:
            chosen: dict[Any, int] = {}
            seen: Counter[str] = Counter()
            for name, (kind, _) in dimensions.items():
                if key(name) not in chosen:
                    chosen[key(name)] = tables[kind][seen[kind] % len(tables[kind])]
                    seen[kind] += 1
            return {name: chosen[key(name)] for name in dimensions}

        return choose

    def place(name: str) -> Any:
        kind, fixed = dimensions[name]  # caches of all layers look alike; ids and a mask [n, t] say nothing
        return kind if kind == "batch" else fixed if any(fixed[:-1]) else name

    def summed(total: Any, parts: Iterable[Any]) -> Callable[[Tables], Sizes]:
        def choose(tables: Tables) -> Sizes:
            sizes = by(place)(tables)
            length = {place(name): size for name, size in sizes.items()}
            return {n: sum(length[p] for p in parts) if place(n) == total else size for n, size in sizes.items()}

        return choose

    yield by(lambda name: name)
    if len({kind for kind, _ in dimensions.values()}) == len(dimensions):
        return
    yield by(lambda name: dimensions[name][0])
    lengths = list(dict.fromkeys(place(name) for name, (kind, _) in dimensions.items() if kind == "length"))
    if len(lengths) > 1:
        yield by(place)
    for total in reversed(lengths if 3 <= len(lengths) <= SUMMANDS else []):
        for parts in combinations([one for one in lengths if one != total], 2):
            yield summed(total, parts)


def _written_down(model: ir.Model, dimensions: Mapping[str, Kind]) -> Iterator[Sizes]:
    """Lengths that values have whatever the feed, the most frequent first: some exports only run at those."""
    lengths = [name for name, (kind, _) in dimensions.items() if kind == "length"]
    if not lengths:
        return
    shapes = infer(model, dict.fromkeys(dimensions, 1)).shapes
    found = Counter(size for node in walk(model.graph) for n in names(node.outputs) for size in set(shapes.get(n, ())))
    for (length, _), ((batch, *_), _) in product(found.most_common(WRITTEN), BATCHES):
        yield {name: length if name in lengths else batch for name in dimensions}


def alternatives(model: ir.Model, given: Mapping[str, int]) -> Iterator[Sizes]:
    """Sizes to run a model at that refuses the usual ones: depending on each other, or written down in it."""
    dimensions = {name: _kind(model.graph, places) for name, places in symbols(model.graph).items()}
    for scale, k in product(SCALES[:1], (0, 1)):
        tables = {kind: table[k] for kind, table in {"batch": BATCHES[0], **scale}.items()}
        yield from (relate(tables) | dict(given) for relate in _dependences(dimensions))
    yield from (sizes | dict(given) for sizes in _written_down(model, dimensions))


def other_probes(model: ir.Model, sizes: Mapping[str, int]) -> list[Sizes]:
    """The same sizes with lengths of quite another scale, for what must hold at every length."""
    kinds = {name: _kind(model.graph, places)[0] for name, places in symbols(model.graph).items()}
    named = [name for name, kind in kinds.items() if kind == "length"]
    rows = [scale["length"][0] for scale in SCALES] if named else []
    return [dict(sizes) | {name: lengths[k % len(lengths)] for k, name in enumerate(named)} for lengths in rows]


def single_lengths(model: ir.Model, given: Mapping[str, int]) -> list[Sizes]:
    """Sizes that are one but for a single length, for models whose unnamed dimensions have to agree."""
    kinds = {name: _kind(model.graph, places)[0] for name, places in symbols(model.graph).items()}
    ones = dict.fromkeys(kinds, 1)
    long = [name for name, kind in kinds.items() if kind == "length" and name not in given][:2]
    return [ones | {name: row[0]} | dict(given) for name in long for scale in SCALES for row in scale["length"]]


def _kind(graph: ir.Graph, places: list[tuple[str, int]]) -> Kind:
    """What a dynamic dimension probably is: batch, image (two of four axes move besides the batch) or length."""
    shapes = {
        str(v.name): [d if isinstance(d, int) and d > 0 else 0 for d in v.shape] for v in true_inputs(graph) if v.shape
    }
    value, axis = places[0]
    shape = shapes[value]
    if any(axis == 0 and len(shapes[value]) > 1 for value, axis in places):
        return "batch", ()
    return "image" if len(shape) == 4 and shape[1:].count(0) > 1 else "length", (*shape, axis)


def cost_sizes(model: ir.Model, given: Mapping[str, int]) -> dict[str, int]:
    """Sizes at which cost is counted: batch 1, images 224 x 224, other lengths 128, unless given."""
    usual = {"batch": 1, "image": 224, "length": 128}
    sizes = {name: usual[_kind(model.graph, places)[0]] for name, places in symbols(model.graph).items()}
    return sizes | dict(given)
