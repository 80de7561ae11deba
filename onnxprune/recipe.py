"""What a run is told: the options, their defaults, and which of them contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxprune import plugin, quality, select
from onnxprune.errors import InputError
from onnxprune.types import Shape

KINDS = ("channels", "heads", "head-dim", "width", "experts", "layers")


@dataclass(frozen=True)
class Options:
    """What `prune` may be told; the defaults are the command line's."""

    ratio: float | None = None
    target: Mapping[str, float | str] = field(default_factory=dict)
    remove: tuple[str, ...] = ("channels", "heads")
    approximate: bool = False
    criterion: str = "mag"
    allocate: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    round_to: int | str = "auto"
    ignore: tuple[str, ...] = ()
    min_keep: int = 1
    input_shape: Mapping[str, Shape] = field(default_factory=dict)
    backend: str = "cpu"
    measure: bool = True
    strict: bool = False
    unproven: bool = False
    seed: int = 0
    threads: int = 1
    seconds: float = 600.0
    dry_run: bool = False
    force: bool = False


def check(options: Options) -> None:
    """Refuse contradictory or impossible options. Raises InputError."""
    if (options.ratio is None) == (not options.target):
        raise InputError("give exactly one of --ratio and --target", object="prune")
    if options.ratio is not None and not 0 <= options.ratio < 1:
        raise InputError("a ratio lies in [0, 1)", object=f"--ratio {options.ratio}")
    if options.ratio is not None and options.allocate not in (None, "uniform"):
        raise InputError("--ratio implies --allocate uniform; use --target", object=f"--allocate {options.allocate}")
    for metric, value in options.target.items():
        select.parse_target(metric, value)
    if options.round_to != "auto" and (not str(options.round_to).isdigit() or int(options.round_to) < 1):
        raise InputError("a positive number or 'auto'", object=f"--round-to {options.round_to}")
    if options.min_keep < 1:
        raise InputError("at least 1", object=f"--min-keep {options.min_keep}")
    if options.threads < 1:
        raise InputError("at least 1", object=f"--threads {options.threads}")
    plugin.build("criteria", options.criterion)
    if options.allocate:
        plugin.build("allocators", options.allocate)
    if options.metric:
        quality.metric(options.metric)
