"""Which units go: groups that may shrink, their scores, and the plan that meets what was asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune import pace, plugin, storage
from onnxprune import select as selection
from onnxprune.allocate import Trials
from onnxprune.analysis import Analysis, named
from onnxprune.errors import ImpossibleError, InputError, InternalError
from onnxprune.model import Model
from onnxprune.nm import NM
from onnxprune.recipe import KINDS, Methods, Options
from onnxprune.recovery import Recovery
from onnxprune.types import Array, Group, Mask, Plan

ROUGH = 3  # plans of an equal share that are measured before a search


def groups_of(analysis: Analysis, options: Options) -> tuple[Group, ...]:
    """The groups that the options allow to shrink. Raises ImpossibleError if there are none."""
    wanted = set(KINDS) if "all" in options.remove else set(options.remove)
    chosen = []
    for group in analysis.groups:
        if group.kind == "layers" and options.ignore:
            group = _unignored(analysis, group, options.ignore)
        touched = {*group.nodes, *(m.initializer for m in group.members)}
        ignored = group.kind != "layers" and any(fnmatch.filter(touched, pattern) for pattern in options.ignore)
        agreed = group.exact or options.approximate
        if agreed and group.kind in wanted and len(group.units) > 1 and not ignored:
            chosen.append(group)
    if not chosen and options.ratio != 0:
        mixing = [g for g in analysis.groups if not g.exact and not (options.approximate and g.kind in wanted)]
        kinds = ",".join(sorted({g.kind for g in mixing}))
        why = f"; {len(mixing)} groups mix their positions: --remove {kinds} --approximate" if mixing else ""
        unknown_ops = sorted(set(analysis.dims.relations.unknown.values()))
        why += f"; {'; '.join(unknown_ops[:3])}" if unknown_ops else ""
        if "layers" in wanted and (stays := analysis.branches.refused):
            why += f"; {len(stays)} branches stay: {stays[0].reason}"
        raise ImpossibleError(f"nothing can be removed{why}; see 'onnxprune inspect'", file=analysis.source.path.name)
    return tuple(chosen)


def _unignored(analysis: Analysis, group: Group, patterns: Sequence[str]) -> Group:
    """A group of branches without those that hold a node or initializer that is to stay."""
    first, nodes = len(analysis.dims.frozen), analysis.view.nodes
    names = [{nodes[i].name or nodes[i].outputs[0] for i in analysis.branches.found[u - first].nodes}
             for u in group.units.tolist()]  # fmt: skip
    for member in group.members:
        names[int(member.units[0])].add(member.initializer)
    left = [k for k, touched in enumerate(names) if not any(fnmatch.filter(touched, p) for p in patterns)]
    place = {k: new for new, k in enumerate(left)}
    members = tuple(
        replace(m, units=np.full(len(m.units), place[int(m.units[0])]))
        for m in group.members
        if int(m.units[0]) in place
    )
    return replace(group, units=group.units[left], members=members)


def score(
    analysis: Analysis, groups: Sequence[Group], options: Options, evidence: plugin.Evidence
) -> tuple[tuple[Group, ...], list[Array]]:
    """Groups that the criterion can score, and their importance.

    What is not of its kinds, the default one scores; what the default one cannot score, magnitude does.
    """
    name = Methods.of(options).criterion
    criterion = plugin.build("criteria", name)
    usual = plugin.build("criteria", Methods.of(replace(options, criterion=None)).criterion)
    magnitude = plugin.build("criteria", "mag")
    scored, importance = [], []
    for group in groups:
        kinds = plugin.trait(criterion, "kinds")
        other = options.criterion is None or (kinds and group.kind not in kinds)
        for one in (usual, magnitude) if other else (criterion,):
            found = one.importance(group, evidence)
            if found is not None:
                break
        if found is not None:
            scored.append(group)
            importance.append(np.nan_to_num(np.asarray(found, np.float64)))
    if groups and not scored:
        raise ImpossibleError(f"{name} scores no group: {criterion.missing}; use --criterion mag")
    return tuple(scored), importance


Scored = tuple[tuple[Group, ...], list[Array]]


def scored(analysis: Analysis, options: Options, evidence: Callable[[Sequence[Group]], plugin.Evidence]) -> Scored:
    """The groups that may shrink, with their scores."""
    groups = groups_of(analysis, options)
    return score(analysis, groups, options, evidence(groups))


def selected(
    analysis: Analysis,
    groups: Sequence[Group],
    importance: Sequence[Array],
    options: Options,
    recovery: Recovery | None = None,
    watch: pace.Stopwatch | None = None,
) -> Plan:
    """Select; where latency is a target, until what is measured meets it."""
    if watch is None:
        plan = _fitted(analysis, groups, importance, options, recovery)
    else:
        plan = _paced(analysis, groups, importance, options, recovery, watch)
    if all(keep.all() for keep in plan.keep.values()) and not _met(analysis, options):
        raise _nothing(analysis, groups, importance, options)
    return plan


def _paced(
    analysis: Analysis,
    groups: Sequence[Group],
    importance: Sequence[Array],
    options: Options,
    recovery: Recovery | None,
    watch: pace.Stopwatch,
) -> Plan:
    """The plan that meets a latency target as measured; where choosing measures, that is done once."""

    def judge(plan: Plan) -> pace.Verdict:
        predicted = analysis.costs.of(analysis.alive(plan))["latency"]
        return watch.judge(options, rewritten(analysis, plan), predicted)

    def choose(factor: float, options: Options, along: Plan | None = None) -> Plan:
        try:
            return _fitted(analysis, groups, importance, options, recovery, factor, watch.multiple, along)
        except selection.OutOfReachError as error:
            least = analysis.settled(over_all_units(analysis, groups, error.plan))
            if error.missed - {"latency"}:
                raise
            if judge(least).over > 1:
                raise watch.out_of_reach(analysis.source.path) from None
            return least

    along, allocator = None, plugin.build("allocators", Methods.of(options).allocate)
    if isinstance(allocator, plugin.Searcher) and plugin.trait(allocator, "measures"):
        even = replace(options, allocate="uniform")
        watch.converge(lambda factor: choose(factor, even), judge, ROUGH)
        along = choose(watch.factor, options)
    plan = watch.converge(lambda factor: choose(factor, options, along), judge)
    if plan is None:
        raise watch.unsettled(analysis.source.path)
    return plan


def _fitted(
    analysis: Analysis,
    groups: Sequence[Group],
    importance: Sequence[Array],
    options: Options,
    recovery: Recovery | None = None,
    factor: float = 1.0,
    liked: int | None = None,
    along: Plan | None = None,
) -> Plan:
    """Select; where `size` is a target, once more with the smaller file's real overhead."""
    overhead = analysis.source.bytes - analysis.costs.of(np.ones(analysis.labels, np.bool_))["size"]
    for _ in range(4):
        trials = recovery.trials if recovery is not None and recovery.reconstructor is not None else None
        limits = _limits(analysis, options, factor)
        chosen = select(analysis, groups, importance, options, limits, overhead, trials, liked, along)
        plan = analysis.settled(over_all_units(analysis, groups, chosen))
        if "size" not in options.target:
            break
        try:
            real = _size(analysis, plan) - analysis.costs.of(analysis.alive(plan))["size"]
        except InternalError:  # the proof will say which group is to blame
            break
        if real <= overhead:
            break
        overhead = real
    return plan


def _size(analysis: Analysis, plan: Plan) -> int:
    """Bytes of the files of a plan's model."""
    return storage.size_of(rewritten(analysis, plan), "pruned.onnx", external=analysis.source.external)


def select(
    analysis: Analysis,
    groups: Sequence[Group],
    importance: Sequence[Array],
    options: Options,
    limits: Mapping[str, float],
    overhead: float = 0.0,
    trials: Callable[..., Trials] | None = None,
    liked: int | None = None,
    along: Plan | None = None,
) -> Plan:
    """Keep masks for the ratio, or for targets in absolute numbers; `overhead` is a file's bytes beyond its weights.

    `trials` makes what an allocator that measures needs; `liked` is the multiple of positions that was found to be
    worth having. A plan `along` which to go takes the allocator's place: all groups go as far towards it, or beyond.
    """
    rounding = _rounding(options, liked)
    if options.ratio is not None:
        return selection.by_ratio(groups, importance, options.ratio, rounding)
    allocator = plugin.build("allocators", Methods.of(options).allocate)
    main = next(iter(limits))
    cost = analysis.costs.of_units(tuple(groups), main)
    searches = isinstance(allocator, plugin.Searcher) and along is None
    measures = searches and plugin.trait(allocator, "measures")
    if measures and trials is None:
        raise InputError(f"{options.allocate} measures: it needs --calibration and a repair", object="--allocate")
    priority: Sequence[Array]
    if along is not None:
        priority = _towards(analysis.alive(along), groups, importance)
    else:
        priority = importance if searches else allocator.priority(importance, cost)

    def of(alive: Mask) -> Mapping[str, float]:
        found = analysis.costs.of(alive)
        return {**found, "size": found["size"] + overhead}

    def chosen(rounding: selection.Rounding) -> Plan:
        return selection.by_target(groups, priority, allocator.floor, rounding, limits, of, analysis.labels)

    rounding = rounding.firm(groups, cost)
    try:  # also where this is not what is searched: says what is out of reach
        plan = chosen(rounding)
    except selection.OutOfReachError:
        rounding = rounding.deepest()
        plan = named(analysis.source.path, lambda: chosen(rounding))
    if searches:

        def share(alive: Mask) -> float:
            found = of(alive)
            return max(found[metric] / most for metric, most in limits.items()) / (1 + 1e-9)

        if trials is None or not measures:
            given = Trials(analysis, groups, importance, rounding, share, None, None, allocator.floor)
        else:
            given = trials(groups, importance, rounding, share, floor=allocator.floor)
        found = given.search(allocator)
        if share(selection.alive_labels(groups, found, analysis.labels)) <= 1:
            plan = found
    return plan


def _rounding(options: Options, liked: int | None = None) -> selection.Rounding:
    """What widths are rounded to: `liked` is the multiple that was found by measuring; a pattern needs whole runs."""
    runs = 1 if options.pattern is None else NM.parse(options.pattern).m
    multiple = None if options.round_to == "auto" else int(options.round_to)
    if options.ratio is not None:
        return selection.Rounding(multiple, options.min_keep, runs)
    return selection.Rounding(multiple, options.min_keep, runs, liked or selection.LIKED, undo=True)


def _towards(alive: Mask, groups: Sequence[Group], importance: Sequence[Array]) -> list[Array]:
    """float64[units] for each group: up to one for units that a plan removes, above for the rest."""
    found = []
    for group, scores in zip(groups, importance, strict=True):
        stays = alive[group.units]
        order = np.lexsort((scores, stays))
        goes = int((~stays).sum())
        priority = np.zeros(len(order))
        priority[order[:goes]] = np.arange(1, goes + 1) / max(goes, 1)
        priority[order[goes:]] = 1 + np.arange(1, len(order) - goes + 1) / max(len(order) - goes, 1)
        found.append(priority)
    return found


def _limits(analysis: Analysis, options: Options, factor: float = 1.0) -> dict[str, float]:
    """Targets in absolute numbers; latency takes `factor` times what the table says."""
    dense = analysis.costs.of(np.ones(analysis.labels, np.bool_))
    limits = {}
    for metric, value in options.target.items():
        number, share = selection.parse_target(metric, value)
        whole = float(analysis.source.bytes) if metric == "size" else dense[metric] if share else 0.0
        limits[metric] = number * whole if share else number
        if metric == "latency":
            limits[metric] /= factor
    return limits


def _met(analysis: Analysis, options: Options) -> bool:
    """Whether the dense model already is what is asked for."""
    dense = analysis.costs.of(np.ones(analysis.labels, np.bool_)) | {"size": float(analysis.source.bytes)}
    limits = _limits(analysis, options)
    return options.ratio == 0 or (bool(limits) and all(dense[metric] <= most for metric, most in limits.items()))


def _nothing(
    analysis: Analysis, groups: Sequence[Group], importance: Sequence[Array], options: Options
) -> ImpossibleError:
    """Nothing goes although groups are free: why, and how far the options let it go."""
    rounding = _rounding(options)
    dense = analysis.costs.of(np.ones(analysis.labels, np.bool_))
    least = analysis.costs.of(
        analysis.alive(over_all_units(analysis, groups, selection.by_ratio(groups, importance, 1 - 1e-9, rounding)))
    )
    told = f"--round-to {options.round_to} and --min-keep {options.min_keep}"
    if least["params"] < dense["params"]:
        reach = ", ".join(
            f"{metric}={least[metric] / dense[metric]:.3f}" for metric in ("params", "macs") if dense[metric]
        )
        why = f"too little is asked for one unit to go at {told}; as far as {reach} can be reached"
    else:
        most = max(len(group.units) for group in groups)
        why = f"{told} leave nothing to remove from groups of at most {most} units; lower them"
    return ImpossibleError(why, file=analysis.source.path)


def over_all_units(analysis: Analysis, groups: Sequence[Group], plan: Plan) -> Plan:
    """The plan over all units of its groups, where some of them were left out for `--ignore`."""
    units = {group.id: group.units for group in analysis.groups}
    return Plan({g.id: ~np.isin(units[g.id], g.units[~plan.keep[g.id]]) for g in groups})


def rewritten(analysis: Analysis, plan: Plan) -> Model:
    """The model of a plan; what loses nothing is copied as it was read."""
    return analysis.dense.clone() if all(keep.all() for keep in plan.keep.values()) else analysis.rewrite(plan)
