"""Calibration data put to use for one run: evidence for criteria, trials for allocators, the final repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune import plugin, reconstruct
from onnxprune.allocate import TRIAL_ROWS, Samples, Trials, rotated, sites_of, started
from onnxprune.analysis import Analysis, cost_shapes
from onnxprune.bases import Bases
from onnxprune.cache import Kept, digest, key_of, opened, versions
from onnxprune.calibrate import Answers, Request, collect
from onnxprune.errors import InputError
from onnxprune.evidence import SHARE, Runs, evidence
from onnxprune.feeds import padding_of, random_feed, samples_in, trimmed
from onnxprune.infer import true_inputs
from onnxprune.layerwise import Repair
from onnxprune.model import Model
from onnxprune.plugin import Reconstructor
from onnxprune.recipe import Methods, Options
from onnxprune.rows import ROWS
from onnxprune.running import Runner
from onnxprune.select import Rounding, parse_size
from onnxprune.sites import fitting, visits
from onnxprune.types import Array, Group, Mask, Plan, Progress, quietly
from onnxprune.worker import Worker

Feeds = Sequence[Mapping[str, Array]]


@dataclass(frozen=True)
class Repaired:
    """A model after repair, the initializers that changed, and what is to be said about it.

    `norms` are nodes that took the mean off before.
    """

    model: Model
    names: list[str]
    warnings: list[str]
    rewrites: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


class Recovery:
    """The samples of a run with everything that is done with them; nothing is, where there are none."""

    def __init__(
        self,
        analysis: Analysis,
        feeds: Feeds,
        options: Options,
        worker: Worker,
        progress: Progress = quietly,
    ) -> None:
        self.analysis, self.options, self.worker, self.progress = analysis, options, worker, progress
        self.memory = parse_size(options.memory)
        name = Methods.of(options).reconstruct
        built = plugin.build("reconstructors", name) if name else None
        padding = padding_of(analysis.dense.graph, feeds)
        feeds = self._trimmed(feeds, padding) if padding is not None else feeds
        self.given = feeds
        if built is not None and not feeds and plugin.trait(built, "synthetic"):
            feeds = _random(analysis, options.seed)
        self.samples = Samples(feeds, padding, options.seed)
        self.reconstructor: Reconstructor | None = built if feeds else None
        self.told: list[str] = []

    def _trimmed(self, feeds: Feeds, padding: str) -> Feeds:
        """The feeds without padding that no sample of theirs needs, if the dense model runs at such lengths."""
        graph = self.analysis.dense.graph
        short = trimmed(graph, feeds, padding, self.options.seed)
        if sum(feed[padding].size for feed in short) == sum(feed[padding].size for feed in feeds):
            return feeds
        shortest = min(short, key=lambda feed: feed[padding].size)
        try:
            Runner(self.worker, self.options.threads, self.memory)(self.analysis.dense, [shortest])
        except InputError:
            return feeds
        return short

    @cached_property
    def stays(self) -> list[str]:
        """Initializers that the user wants left alone."""
        names = [str(name) for name in {s.initializer for s in self.analysis.view.stored.values()}]
        return sorted({name for pattern in self.options.ignore for name in matching(names, pattern)})

    @cached_property
    def caches(self) -> frozenset[str]:
        """Outputs that only add to an input what the next step reads: as much as that matters, other outputs tell."""
        shapes = self.analysis.prepared.facts.shapes
        return frozenset(made for given, made in self.analysis.branches.caches if shapes[given] != shapes[made])

    @cached_property
    def bases(self) -> Bases | None:
        """Changes of basis that the model allows, where weights may change at all."""
        if self.reconstructor is None or not plugin.trait(self.reconstructor, "subspaces"):
            return None
        return Bases(self.analysis, self.gather, untie=not {"params", "size"} & {*self.options.target})

    def leave_means(self, holds: Callable[[Model], bool]) -> None:
        """Let norms leave the mean to what writes their width, where that is wanted and `holds` on the dense model."""
        options, wanted = self.options, plugin.trait(self.reconstructor, "ln2rms")
        if not wanted or not self.bases or options.pattern is not None or options.precision != "fp32":
            return
        self.bases.means = self.bases.removable()
        model, norms = rotated(self.analysis, self.bases)
        self.bases.means = frozenset(norms if norms and holds(model) else ())
        if norms and not self.bases.means:
            self.told.append("norms keep the mean, since the proof that they need not failed; this is our bug")

    @cached_property
    def kept(self) -> Kept:
        """What earlier runs found out about this model with these samples."""
        cache = opened(self.options.cache, self.options.no_cache)
        if cache.folder is None:
            return Kept()
        packages = versions("onnxprune", "numpy", "scipy", "onnxruntime", "onnxruntime-gpu")
        analysed = [self.analysis.given, self.options.remove, self.options.allow_interface_change]
        about = [self.analysis.source.sha256, analysed, digest(self.samples.feeds), packages]
        return Kept(cache, key_of(*about))

    def gather(self, requests: Sequence[Request[Any]]) -> Answers:
        """Statistics of the dense model over all samples."""
        return collect(
            self.worker,
            self.analysis.prepared.model,
            self.samples.feeds,
            requests,
            padding=self.samples.padding,
            seed=self.options.seed,
            budget=self.memory // SHARE,
            threads=self.options.threads,
            memory=self.memory,
            kept=self.kept,
            progress=lambda done, total: self.progress("statistics", done, total),
        )

    def evidence(self, groups: Sequence[Group]) -> plugin.Evidence:
        """What criteria may look at."""
        gather = self.gather if self.given else None
        run = Runs(self.worker, self.given, self.options.threads, self.memory)
        return evidence(self.analysis, groups, self.options.seed, gather, self.memory, run, self.progress)

    def trials(
        self,
        groups: Sequence[Group],
        importance: Sequence[Array],
        rounding: Rounding,
        cost: Callable[[Mask], float],
        floor: float,
    ) -> Trials:
        """What an allocator needs that measures plans."""
        knobs = sum(len(group.units) if group.kind == "layers" else 1 for group in groups)
        samples, affordable = self._afforded(knobs)
        allowed = [sorted(self.bases.tied), sorted(self.bases.means)] if self.bases else []
        how = [repr(self.reconstructor), allowed, sorted(self.caches), self.options.threads]
        asked = [samples.padding, samples.seed, digest(samples.feeds), *how]
        self._begin(samples.fitted, samples.judged, TRIAL_ROWS)
        return Trials(
            self.analysis,
            groups,
            importance,
            rounding,
            cost,
            self.worker,
            self.reconstructor,
            floor,
            self.stays,
            self.bases,
            lambda done: self.progress("measure plans", done, int(affordable)),
            affordable,
            kept=self.kept,
            asked=asked,
            change=lambda: self._begin(*samples.changed, TRIAL_ROWS),
            tell=self._tell,
        )

    def _tell(self, text: str) -> None:
        """Note for the report what a search says, once if it runs again."""
        if text not in self.told:
            self.told.append(text)

    def _afforded(self, knobs: int) -> tuple[Samples, float]:
        """(samples of a trial, trials) that the effort pays for; trials of fewer samples before fewer than two rounds.

        Counted in MACs, so that the same input gives the same result on every machine.
        """
        model = self.analysis.prepared.model
        shapes = cost_shapes(model, self.analysis.given)
        inputs = sum(math.prod(shapes.get(str(value.name), ())) for value in true_inputs(model.graph))
        dense = self.analysis.costs.of(np.ones(self.analysis.labels, np.bool_))["macs"]
        run, fit = dense * self.samples.work / max(inputs, 1), TRIAL_ROWS * fitting(model.graph, shapes)
        order = visits(model.graph, sites_of(self.analysis, Plan({}), model, self.stays))
        run *= 1 + USUAL * sum(bool(visit.behind) for visit in order)
        work = WORK.get(self.options.effort, WORK["default"])
        samples = self.samples.some(max(work / (2 * knobs) - fit, 0) / max(run, 1))
        return samples, work / (run * samples.work / max(self.samples.work, 1) + fit)

    def repair(self, plan: Plan, pruned: Model) -> Repaired:
        """The repaired model of a plan; as it is, where there is nothing to repair or repair makes it worse.

        Whether it does is seen on the half of the samples that a first repair was not fitted to; the final one is
        fitted to all of them.
        """
        found = self._repaired(plan, pruned)
        return replace(found, warnings=[*self.told, *found.warnings])

    def _repaired(self, plan: Plan, pruned: Model) -> Repaired:
        if self.reconstructor is None or all(keep.all() for keep in plan.keep.values()):
            return Repaired(pruned, [], [])
        start = started(self.analysis, plan, pruned, self.bases, self.stays)
        if not start.sites:
            return Repaired(
                pruned, [], ["nothing could be repaired: no linear operator has a weight that can be fitted"]
            )
        self._begin(self.samples.fitted, self.samples.held_out, TRIAL_ROWS)
        naive = reconstruct.repair(self.worker, pruned, [], None, judge=True).divergence
        tried = reconstruct.repair(
            self.worker, start.model, start.sites, self.reconstructor, start=start.arrays, judge=True
        )
        if math.isnan(naive):
            return Repaired(pruned, [], ["nothing was repaired: no output is a tensor that repair could be judged by"])
        if not tried.divergence < naive:
            why = f"did not help on held-out samples ({naive:.3g} to {tried.divergence:.3g}), so nothing was repaired"
            return Repaired(pruned, [], [f"repair {why}; more calibration samples would help", *_large(tried)])
        self._begin(self.samples.feeds, (), ROWS)
        found = reconstruct.repair(
            self.worker,
            start.model,
            start.sites,
            self.reconstructor,
            start=start.arrays,
            progress=lambda done, total: self.progress("repair", done, total),
        )
        model = start.model.clone()
        names = reconstruct.apply(model, found.changes)
        told = [] if self.given else [f"there is no calibration data: repaired on {RANDOM} random inputs"]
        told += [*self._thin(found), *_large(found)]
        return Repaired(model, names, told, start.rewrites, start.norms)

    def _thin(self, found: Repair) -> list[str]:
        """A warning where there were few rows for the columns of a site, or few samples for any."""
        damped = {site: sizes for site, sizes in found.rows.items() if found.ridges.get(site)}
        if not damped:
            return []
        site, (rows, columns) = min(damped.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
        if rows < ENOUGH * columns:
            what, more = (
                ("--memory", "more of it makes") if site in found.short else ("calibration", "more samples make")
            )
            text = f"{what} leaves {rows} rows for the {columns} input columns of '{site}'"
            return [f"{text}, so weights were changed less; {more} a better repair"]
        count = sum(samples_in(feed, self.analysis.dense.graph) for feed in self.given)
        if not 0 < count < MANY:
            return []
        return [f"the repair fits {count} calibration samples better than others; {MANY} or more do better"]

    def _begin(self, fitted: Any, judged: Any, rows: int) -> None:
        model = self.analysis.prepared.model
        sampling = self.samples.sampling(rows)
        told = {"judged": judged, "aside": self.caches, "threads": self.options.threads, "memory": self.memory}
        reconstruct.begin(self.worker, model, fitted, sampling, **told)


def _large(found: Repair) -> list[str]:
    """A warning where sites take more memory than they may."""
    if not found.large:
        return []
    site, most = max(found.large.items(), key=lambda item: item[1])
    many = "1 value was" if len(found.large) == 1 else f"{len(found.large)} values were"
    return [f"{many} not repaired: that takes up to {most / 1e9:.1f} GB ('{site}'), more than --memory leaves"]


WORK = {"default": 1e13, "thorough": 1e14}  # MACs that trials may take together
USUAL = 3  # runs for each weight of which some readers lie behind others
ENOUGH = 3  # rows for each column below which a fit is thin
MANY = 64  # samples below which what they have in common by chance is fitted too
RANDOM = 64  # inputs for a repair without data


def _random(analysis: Analysis, seed: int) -> list[dict[str, Array]]:
    """Random inputs at the sizes that cost is counted at."""
    graph, shapes = analysis.prepared.model.graph, cost_shapes(analysis.prepared.model, analysis.given)
    return [random_feed(graph, shapes, seed + k) for k in range(RANDOM)]
