"""How much goes from where, by measuring: plans are tried out, repaired and judged by what is left at the outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxprune import reconstruct
from onnxprune.analysis import Analysis
from onnxprune.bases import Bases, Start
from onnxprune.cache import Kept
from onnxprune.dims import keep_of
from onnxprune.errors import InternalError
from onnxprune.feeds import blended, noisy
from onnxprune.model import Model
from onnxprune.plugin import Knob, Reconstructor, Search, Searcher
from onnxprune.rows import ROWS, Sampling
from onnxprune.select import Rounding
from onnxprune.sites import Site, find_sites
from onnxprune.types import Array, Axis, Group, Mask, Plan, Positions
from onnxprune.worker import Worker

Feeds = Sequence[Mapping[str, Array]]
NOISE = 0.25  # standard deviations
COPIES = 2
FEW = 2  # feeds to fit to, and as many to judge by, that a trial takes at least
TRIAL_ROWS = 4_000  # rows of one site while plans are compared


def sites_of(
    analysis: Analysis, plan: Plan, pruned: Model, stays: Sequence[str] = (), untied: Collection[str] = ()
) -> list[Site]:
    """Where the model of a plan can be repaired; initializers in `stays` keep their values.

    Those in `untied` may change for an operator alone, although others read them.
    """
    alive, shapes = analysis.alive(plan), analysis.view.shapes

    def keep(axis: Axis) -> Mask:
        return keep_of(analysis.dims, alive, axis, shapes[axis.value][axis.index])

    return find_sites(pruned, analysis.prepared.model, shapes, keep, stays, untied, joint=True)


def started(analysis: Analysis, plan: Plan, pruned: Model, bases: Bases | None, stays: Sequence[str] = ()) -> Start:
    """Where the model of a plan can be repaired, and what from: subspaces where there are bases, else positions."""
    if not bases:
        return Start(pruned, sites_of(analysis, plan, pruned, stays), {})
    alive = analysis.alive(plan)
    return bases.start(pruned, alive, sites_of(analysis, plan, pruned, stays, bases.untied(alive)))


def rotated(analysis: Analysis, bases: Bases) -> tuple[Model, tuple[str, ...]]:
    """(the dense model with its widths turned and nothing taken out of them: the same function, norms without a mean).

    What writes a width takes its mean off instead of those of `bases.means`.
    """
    model = analysis.rewrite(Plan({}))
    start = bases.whole(model, sites_of(analysis, Plan({}), model, untied=bases.tied))
    found = start.model.clone()
    reconstruct.apply(found, start.arrays)
    return found, start.norms


@dataclass(frozen=True)
class Samples:
    """Calibration feeds, what marks their padding, and how they are split: half to fit to, half to judge by."""

    feeds: Feeds
    padding: str | None
    seed: int = 0

    @property
    def fitted(self) -> Feeds:
        """The half that is fitted to; everything where there is a single feed."""
        return self.feeds[::2]

    @property
    def held_out(self) -> Feeds:
        """The other half; everything where there is a single feed."""
        return self.feeds[1::2] or self.feeds

    @property
    def judged(self) -> Feeds:
        """What plans are judged by: the other half under noise, where it can carry some.

        Samples that a model was trained on say too little about others; the same with noise ranks plans as others do.
        """
        copies = [feed for k in range(COPIES) for feed in noisy(self.held_out, NOISE, self.seed + k)]
        return copies or self.held_out

    @property
    def changed(self) -> tuple[Feeds, Feeds]:
        """(to fit to, to judge by) for a second opinion: the halves changed over, and blends of what is judged by."""
        other = self.fitted
        copies = [feed for k in range(2 * COPIES) for feed in blended(other, self.seed + k)]
        return self.held_out, copies or other

    @property
    def work(self) -> int:
        """How many numbers one trial of all samples reads, which is what running them grows with."""
        return sum(array.size for feed in (*self.fitted, *self.judged) for array in feed.values())

    def some(self, share: float) -> Samples:
        """A share of the feeds, evenly spaced, in pairs of one to fit to and one to judge by; FEW at least."""
        pairs = max(len(self.feeds) // 2, 1)
        wanted = min(pairs, max(FEW, round(share * pairs)))
        chosen = np.unique(np.linspace(0, pairs - 1, wanted).round().astype(int)).tolist()
        feeds = [feed for k in chosen for feed in self.feeds[2 * k : 2 * k + 2]]
        return self if wanted == pairs else replace(self, feeds=feeds)

    def sampling(self, rows: int = ROWS) -> Sampling:
        """How rows are drawn from them."""
        return Sampling(rows, self.seed, self.padding)


@dataclass
class Trials:
    """Plans tried out: pruned, repaired with one half of the samples and judged by the other; each only once."""

    analysis: Analysis
    groups: Sequence[Group]
    importance: Sequence[Array]
    rounding: Rounding
    cost: Callable[[Mask], float]
    worker: Worker | None
    reconstructor: Reconstructor | None
    floor: float = 0.0
    stays: Sequence[str] = ()
    bases: Bases | None = None
    progress: Callable[[int], None] = lambda done: None
    affordable: float = float("inf")
    ridges: dict[str, float] = field(default_factory=dict)
    found: dict[tuple[int, ...], float] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    asked: Sequence[object] = ()
    change: Callable[[], None] | None = None
    tell: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.knobs: list[Knob] = []
        self.orders: list[tuple[Group, Positions]] = []
        for group, scores in zip(self.groups, self.importance, strict=True):
            order = np.argsort(scores, kind="stable")
            if group.kind == "layers":  # whose importance is that of an average slice
                for k in order.tolist():
                    worth = np.array([0.0, scores[k] * max(group.slices()[k], 1)])
                    self.knobs.append(Knob(group.kind, np.array([0, 1]), worth))
                    self.orders.append((group, np.array([k])))
            else:
                worth = np.concatenate([[0.0], np.cumsum(scores[order])])
                self.knobs.append(Knob(group.kind, self.rounding.table(group, self.floor), worth))
                self.orders.append((group, order))

    def plan(self, state: Sequence[int]) -> Plan:
        """The plan of a state: how many units of each knob go."""
        keep = {group.id: np.ones(len(group.units), np.bool_) for group in self.groups}
        for (group, order), count in zip(self.orders, state, strict=True):
            keep[group.id][order[:count]] = False
        return Plan(keep)

    def cost_of(self, state: Sequence[int]) -> float:
        """The largest ratio of a state's cost to its limit."""
        return self.cost(self.analysis.alive(self.plan(state)))

    def damage(self, states: Sequence[Sequence[int]]) -> Array:
        """float64[states]: the divergence that is left after repair; infinite where a plan cannot be carried out."""
        return np.array([self._damage(tuple(state)) for state in states])

    def confirm(self, states: Sequence[Sequence[int]]) -> Array:
        """`damage` by a second opinion; the last thing to be asked."""
        assert self.change is not None
        self.change()
        other = replace(self, ridges={}, found={}, asked=[*self.asked, "second opinion"], change=None)
        return other.damage(states)

    def _damage(self, state: tuple[int, ...]) -> float:
        if state not in self.found:
            self.found[state] = self._measured(self.analysis.settled(self.plan(state)))
            self.progress(len(self.found))
        return self.found[state]

    def _measured(self, plan: Plan) -> float:
        try:
            pruned = self.analysis.rewrite(plan)
        except InternalError:
            return float("inf")
        start = started(self.analysis, plan, pruned, self.bases, self.stays)
        keep = {id: np.flatnonzero(~mask).tolist() for id, mask in sorted(plan.keep.items()) if not mask.all()}
        asked = [*self.asked, keep, self.ridges, list(self.stays), self.bases is not None]
        if (before := self.kept.get("trials", *asked)) is not None:
            fresh = dict(zip(before["sites"].tolist(), before["ridges"].tolist(), strict=True))
            self.ridges = {**fresh, **self.ridges}
            return float(before["divergence"])
        assert self.worker is not None
        found = reconstruct.repair(
            self.worker,
            start.model,
            start.sites,
            self.reconstructor,
            start=start.arrays,
            judge=True,
            keep=True,
            ridges=self.ridges,
        )
        self.ridges = {**found.ridges, **self.ridges}
        divergence = found.divergence if np.isfinite(found.divergence) else float("inf")
        sites, ridges = np.array(list(found.ridges), np.str_), np.array(list(found.ridges.values()), np.float64)
        self.kept.put("trials", {"divergence": np.array(divergence), "sites": sites, "ridges": ridges}, *asked)
        return divergence

    def search(self, searcher: Searcher) -> Plan:
        """The plan that an allocator finds by measuring."""
        confirm = self.confirm if self.change is not None else None
        problem = Search(tuple(self.knobs), self.cost_of, self.damage, self.affordable, confirm, self.tell)
        return self.plan(searcher.search(problem))
