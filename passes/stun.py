"""Experts that resemble each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

from onnxprune.plugin import Evidence
from onnxprune.types import Array, Group


@dataclass(frozen=True)
class ExpertClusters:
    """Experts whose router rows lie close are one cluster, of which the one nearest to its mean weights stays.

    Clusters are joined from the closest on (complete linkage); with each, one representative less is needed. Source:
    METHODS G5 (STUN, Lee et al. 2024). Scores experts. Needs weights only.
    """

    kinds: ClassVar[tuple[str, ...]] = ("experts",)
    missing: ClassVar[str] = "it scores experts with a row of a router's weight each: --remove experts --approximate"

    def importance(self, group: Group, evidence: Evidence) -> Array | None:
        """float64[units], higher stays: the distance at which another expert can stand in."""
        if group.kind != "experts":
            return None
        count = len(group.units)
        routers: list[Array] = []
        slices: list[list[Array]] = [[] for _ in range(count)]
        for member in group.members:
            if member.role not in ("weight", "bias"):
                continue
            array = np.moveaxis(evidence.weights.array(member.initializer), member.axis, 0)
            own = [array[member.positions[member.units == k]].reshape(-1) for k in range(count)]
            if array.ndim == 2 and member.role == "weight" and len({each.size for each in own}) == 1:
                routers.append(np.stack(own))
            else:
                for each, rows in zip(slices, own, strict=True):
                    each.append(rows)
        weights = [np.concatenate([np.zeros(0), *each]) for each in slices]
        if not routers or len({each.size for each in weights}) != 1:
            return None
        return clusters(routers[0], np.stack(weights))


def clusters(router: Array, weights: Array) -> Array:
    """float64[experts] from float64[experts, inputs] and float64[experts, weights]."""
    count = len(router)
    found = np.zeros(count)
    inside, stays = {k: [k] for k in range(count)}, {k: k for k in range(count)}
    height = 0.0
    for step, (a, b, distance, _) in enumerate(linkage(pdist(router), "complete")):
        height = max(height * (1 + 1e-9), float(distance))
        joined = inside[int(a)] + inside[int(b)]
        mean = weights[joined].mean(axis=0)
        both = [stays[int(a)], stays[int(b)]]
        best = min(both, key=lambda k: (float(((weights[k] - mean) ** 2).sum()), k))
        found[both[0] if best == both[1] else both[1]] = height
        inside[count + step], stays[count + step] = joined, best
        found[best] = 2 * height + 1e-9
    return found
