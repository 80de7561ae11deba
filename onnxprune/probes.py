"""Which sizes the dynamic dimensions of a model get while it is analysed, proven and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, permutations, product
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from onnxprune.infer import Facts, Inference, symbol, true_inputs
from onnxprune.types import Shape

Sizes = dict[str, int]
Kind = tuple[str, tuple[int, ...]]  # batch, image or length; then what is fixed about its first place
Tables = Mapping[str, Sequence[int]]

# From the cheapest on: attention over every pixel grows with the fourth power of an image's side.
SCALES: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    {"image": ((32, 64), (64, 96)), "length": ((11, 13, 17), (19, 29, 37))},
    {"image": ((64, 96), (128, 160)), "length": ((64, 96, 160), (224, 288, 352))},
    {"image": ((224, 320), (256, 416)), "length": ((1024, 1536), (2560, 3072))},
    {"image": ((224, 224), (256, 256)), "length": ((16384,), (24576,))},
)
SHORT = (5, 7)  # lengths that will do where every token costs
WRITTEN = 24  # sizes in a graph that are tried as lengths
SUMMANDS = 4  # lengths up to which sums are tried
STEPS = ((1, 17), (19, 0))  # new and past tokens: some exports take one token after others, or the first ones
BATCHES = (((3, 7, 11), (5, 13, 17)), ((1,), (1,)))  # some exports bake batch 1 in and still call it dynamic


def probes(inference: Inference, given: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes for the dynamic dimensions at which the graph is consistent, or as nearly as can be found.

    Batches get small primes, so that they are never mistaken for a factor of something else; images get multiples
    of 32; other lengths get primes first, then what convolutions over long signals need. Sizes that depend on each
    other under names of their own are tried as equal, and as sums: a mask is as long as past and present together,
    and of past and present one may have to be short.
    What an operator needs (the head size of a cache) is asked of it. `given` sizes stand in the first set.
    """
    fixed, dimensions = _dimensions(inference, given)
    best: tuple[int, Sizes, Sizes] | None = None
    for batches, scale in product(BATCHES, SCALES):
        if not dimensions:
            return dict(fixed), dict(fixed)
        tables = [_tables(batches, scale, k) for k in (0, 1)]
        for relate in _dependences(dimensions, scale is SCALES[0]):
            first, second = map(relate, tables)
            first, second = first | fixed | dict(given), second | fixed
            (first, facts), (second, others) = _suited(inference, first, given), _suited(inference, second)
            problems = len(facts.problems) + len(others.problems)
            if best is None or problems < best[0]:
                best = (problems, first, second)
            if problems == 0:
                return first, _freer(inference, dimensions, fixed, first, second)
    assert best is not None
    for sizes in _written_down(inference, dimensions):
        sizes |= fixed | dict(given)
        if (problems := 2 * len(inference.at(sizes).problems)) < best[0]:
            best = (problems, sizes, sizes)
        if problems == 0:
            break
    return best[1], best[2]


def _tables(batches: Sequence[Sequence[int]], scale: Mapping[str, Sequence[Sequence[int]]], k: int) -> Tables:
    """The sizes of one probe by kind."""
    return {"batch": batches[k], "step": STEPS[k]} | {kind: rows[k] for kind, rows in scale.items()}


ROUNDS = 4  # of asking until nothing changes


def _suited(inference: Inference, sizes: Sizes, given: Container[str] = ()) -> tuple[Sizes, Facts]:
    """The sizes as operators need them, but for given ones, and what is known at those."""
    named = {place: name for name, places in inference.symbols.items() for place in places}
    facts = inference.at(sizes)
    for _ in range(ROUNDS):
        asked = {named[place]: size for place, size in facts.asked.items() if place in named and size >= 0}
        asked = {name: size for name, size in asked.items() if name not in given}
        if not asked:
            break
        sizes = sizes | asked
        facts = inference.at(sizes)
    return sizes, facts


def _freer(inference: Inference, dimensions: Mapping[str, Kind], fixed: Sizes, first: Sizes, second: Sizes) -> Sizes:
    """The second set, or one whose batch differs from the first where an operator asked for one batch in both.

    Attention over a cache takes several tokens of several sequences only while the cache is empty.
    """
    batch = [n for n, (kind, _) in dimensions.items() if kind == "batch"]
    if all(first[name] != second[name] for name in batch):
        return second
    for relate in _dependences(dimensions):
        sizes, facts = _suited(inference, relate(_tables(BATCHES[0], SCALES[0], 1)) | fixed)
        if not facts.problems and all(sizes[name] != first[name] for name in batch):
            return sizes
    return second


def _dependences(dimensions: Mapping[str, Kind], steps: bool = True) -> Iterable[Callable[[Tables], Sizes]]:
    """Ways to choose sizes: each by itself; one for each kind; one for each place, of which one is the sum of two.

    With `steps` also such that one of the two summands is one, in the other probe the other zero.
    """

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

    def stepped(total: Any, new: Any, past: Any) -> Callable[[Tables], Sizes]:
        def choose(tables: Tables) -> Sizes:
            step = dict(zip((new, past, total), (*tables["step"], sum(tables["step"])), strict=True))
            return {name: step.get(place(name), size) for name, size in by(place)(tables).items()}

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
    for new, past, total in permutations(lengths if steps and 3 <= len(lengths) <= SUMMANDS else [], 3):
        yield stepped(total, new, past)


def _written_down(inference: Inference, dimensions: Mapping[str, Kind]) -> Iterator[Sizes]:
    """Lengths that values have whatever the feed, the most frequent first: some exports only run at those."""
    lengths = [name for name, (kind, _) in dimensions.items() if kind == "length"]
    if not lengths:
        return
    shapes = inference.at(dict.fromkeys(inference.symbols, 1)).shapes
    found = Counter(size for seen in inference.nodes for n in seen.outputs for size in set(shapes.get(n, ())))
    for (length, _), ((batch, *_), _) in product(found.most_common(WRITTEN), BATCHES):
        yield {name: length if name in lengths else batch for name in dimensions}


def alternatives(model: ir.Model, given: Mapping[str, int]) -> Iterator[Sizes]:
    """Sizes to run a model at that refuses the usual ones: depending on each other, or written down in it."""
    inference = Inference(model)
    fixed, dimensions = _dimensions(inference, given)
    for k, relate in product((0, 1), _dependences(dimensions)):
        yield _suited(inference, relate(_tables(BATCHES[0], SCALES[0], k)) | fixed | dict(given), given)[0]
    yield from (sizes | fixed | dict(given) for sizes in _written_down(inference, dimensions))


def other_probes(inference: Inference, sizes: Mapping[str, int]) -> list[Sizes]:
    """The same sizes with lengths of quite another scale, for what must hold at every length."""
    named = [name for name, (kind, _) in _dimensions(inference, {})[1].items() if kind == "length"]
    rows = [scale["length"][0] for scale in SCALES] if named else []
    chosen = [dict(sizes) | {name: lengths[k % len(lengths)] for k, name in enumerate(named)} for lengths in rows]
    return [_suited(inference, sizes)[0] for sizes in chosen]


def single_lengths(model: ir.Model, given: Mapping[str, int]) -> list[Sizes]:
    """Sizes that are one but for a single length, for models whose unnamed dimensions have to agree."""
    fixed, kinds = _dimensions(Inference(model), given)
    ones = dict.fromkeys(kinds, 1) | fixed
    long = [name for name, (kind, _) in kinds.items() if kind == "length" and name not in given][:2]
    return [ones | {name: row[0]} | dict(given) for name in long for scale in SCALES for row in scale["length"]]


def small_sizes(model: ir.Model, sizes: Sequence[Mapping[str, int]], given: Mapping[str, int]) -> list[Sizes]:
    """The same sizes with batches of one, two and so on, for what takes long to run.

    Where there is one length, and a short one at that, it is shorter still in the first of them.
    """
    kinds = {name: kind for name, (kind, _) in _dimensions(Inference(model), {})[1].items() if name not in given}
    batches, lengths = ([name for name, kind in kinds.items() if kind == wanted] for wanted in ("batch", "length"))
    found = [{**one, **{name: k for name in batches if name in one}} for k, one in enumerate(sizes, 1)]
    if len(lengths) != 1 or any(
        one.get(lengths[0]) != row[0] for one, row in zip(sizes, SCALES[0]["length"], strict=True)
    ):
        return found
    return [{**one, lengths[0]: short} for one, short in zip(found, SHORT, strict=True)] + found


def _dimensions(inference: Inference, given: Mapping[str, int]) -> tuple[Sizes, dict[str, Kind]]:
    """Dynamic dimensions of which an operator asks for one size only, and what the others are."""
    graph, places = inference.model.graph, inference.symbols
    kinds = {name: _kind(graph, places[name], {}) for name in places}
    if not any(kind == "image" for kind, _ in kinds.values()):
        return {}, kinds
    relate = next(iter(_dependences(kinds)))
    free = [relate(_tables(BATCHES[0], SCALES[0], k)) | dict(given) for k in (0, 1)]
    (first, _), (second, _) = (_suited(inference, sizes, given) for sizes in free)
    alike = {n for n, (kind, _) in kinds.items() if kind == "image" and first[n] == second[n]}
    fixed = {name: first[name] for name in alike if free[0][name] != free[1][name]}
    return fixed, {name: _kind(graph, places[name], fixed) for name in places if name not in fixed}


def _kind(graph: ir.Graph, places: list[tuple[str, int]], fixed: Mapping[str, int]) -> Kind:
    """What a dynamic dimension probably is: batch, image (two of four axes move besides the batch) or length."""
    shapes = {
        str(v.name): [d if isinstance(d, int) and d > 0 else fixed.get(symbol(v, k), 0) for k, d in enumerate(v.shape)]
        for v in true_inputs(graph)
        if v.shape
    }
    value, axis = places[0]
    shape = shapes[value]
    if any(axis == 0 and len(shapes[value]) > 1 for value, axis in places):
        return "batch", ()
    return "image" if len(shape) == 4 and shape[1:].count(0) > 1 else "length", (*shape, axis)


COSTED = {"image": (224,), "length": (128,), "step": (128, 0)}


def cost_facts(model: ir.Model, given: Mapping[str, int], ranks: Mapping[str, Shape] = MappingProxyType({})) -> Facts:
    """What is known at the sizes at which cost is counted: as given, else batch 1, images 224 x 224, lengths 128.

    Where the graph is inconsistent at those, or a value has more axes in `ranks` (a Squeeze takes a batch of one too),
    lengths are tried as sums, and then a batch of two.
    """
    inference = Inference(model)
    fixed, dimensions = _dimensions(inference, given)
    best: tuple[int, Facts] | None = None
    for batch, relate in product((1, 2), _dependences(dimensions)):
        _, facts = _suited(inference, relate({"batch": (batch,), **COSTED}) | fixed | dict(given), given)
        problems = len(facts.problems) + sum(
            len(shape) != len(ranks[name]) for name, shape in facts.shapes.items() if name in ranks
        )
        if best is None or problems < best[0]:
            best = problems, facts
        if not problems:
            break
    assert best is not None
    return best[1]
