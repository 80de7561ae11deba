"""What a run is told: the options, their defaults, which of them contradict each other, and their YAML form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from onnxprune import plugin, quality, runtime, select
from onnxprune.errors import InputError
from onnxprune.limits import MOST_SEED, MOST_THREADS
from onnxprune.nm import NM
from onnxprune.types import Shape

KINDS: Mapping[str, str] = {
    "channels": "Channels of convolutions, FFN neurons, recurrent units, any exact width.",
    "heads": "Attention heads, with grouped queries a key-value head and its queries.",
    "head-dim": "Positions inside every head: of queries and keys, of values and output.",
    "width": "Positions of a residual width, or inside every group of a GroupNorm; mixing.",
    "experts": "Experts behind a router, with their row of it; mixing behind a softmax or top-k.",
    "layers": "Residual branches, which become identity.",
}


@dataclass(frozen=True)
class Options:
    """What `prune` may be told; the defaults are the command line's."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratio: float | None = None
    target: Mapping[str, float | str] = field(default_factory=dict)
    remove: tuple[str, ...] = ("channels", "heads")
    approximate: bool = False
    criterion: str | None = None
    allocate: str | None = None
    reconstruct: str | None = None
    effort: str = "default"
    no_new_bias: bool = False
    memory: str = "3GB"
    cache: str | None = None
    no_cache: bool = False
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    round_to: int | str = "auto"
    ignore: tuple[str, ...] = ()
    min_keep: int = 1
    pattern: str | None = None
    sparsifier: str | None = None
    permute: bool = False
    input_shape: Mapping[str, Shape] = field(default_factory=dict)
    precision: str = "fp32"
    backend: str = "cpu"
    measure: bool = True
    strict: bool = False
    unproven: bool = False
    seed: int = 0
    threads: int = 1
    timeout: float = 600.0
    dry_run: bool = False
    force: bool = False
    allow_interface_change: bool = False


WRITTEN = ("fp32", "fp16")  # precisions of a pruned model
EFFORTS = ("quick", "default", "thorough")


@dataclass(frozen=True)
class Methods:
    """Which criterion, allocator, reconstructor and sparsifier a run takes; None: nothing is repaired, no N:M."""

    criterion: str
    allocate: str
    reconstruct: str | None
    sparsifier: str | None = None

    @classmethod
    def of(cls, options: Options) -> Methods:
        """What the options name, else the best that the given data and effort allow."""
        calibrated = options.calibration is not None
        repair = options.reconstruct or ("sequential" if calibrated else "none")
        measured = {"quick": "measured,rounds=0", "default": "measured", "thorough": "measured,rounds=16,trials=600"}
        # Magnitude is that of a mean slice: divided by cost, units of many slices would go first whatever they are.
        search = measured[options.effort] if calibrated and repair != "none" else "global-rank,power=0"
        return cls(
            options.criterion or ("obs-struct" if calibrated else "mag"),
            options.allocate or ("uniform" if options.ratio is not None else search),
            None if repair == "none" else repair,
            (options.sparsifier or ("nm-sparsegpt" if calibrated else "nm-mag")) if options.pattern else None,
        )


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
    if "latency" in options.target and not options.measure:
        raise InputError("a latency target needs measuring; leave --no-measure out", object="--target latency")
    if options.cache is not None and options.no_cache:
        raise InputError("give one of --cache and --no-cache", object="prune")
    if unknown := set(options.remove) - {*KINDS, "all"}:
        kind = sorted(unknown)[0]
        raise InputError(f"unknown kind; there are {', '.join(KINDS)}, all", object=f"--remove '{kind}'")
    text = str(options.round_to)
    if text != "auto" and (not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < 1):
        raise InputError("a positive number or 'auto'", object=f"--round-to {text}")
    for name, number, least, most in (
        ("min-keep", options.min_keep, 1, 2**31),
        ("threads", options.threads, 1, MOST_THREADS),
        ("seed", options.seed, 0, MOST_SEED),
    ):
        if not least <= number <= most:
            raise InputError(f"at least {least} and at most {most}", object=f"--{name} {number}")
    if not options.timeout > 0:
        raise InputError("a number of seconds above 0", object=f"--timeout {options.timeout:g}")
    if options.effort not in EFFORTS:
        raise InputError(f"one of {', '.join(EFFORTS)}", object=f"--effort {options.effort}")
    if options.precision not in WRITTEN:
        what = f"a pruned model is {' or '.join(WRITTEN)}; 'build' and 'export' take it to others"
        raise InputError(what, object=f"--precision {options.precision}")
    runtime.known(options.backend)
    select.parse_size(options.memory)
    methods = Methods.of(options)
    criterion = plugin.build("criteria", methods.criterion)
    if plugin.trait(criterion, "calibrated") and options.calibration is None:
        raise InputError(f"--criterion {methods.criterion} needs --calibration", object="prune")
    plugin.build("allocators", methods.allocate)
    if methods.reconstruct is not None:
        reconstructor = plugin.build("reconstructors", methods.reconstruct)
        if options.calibration is None and not plugin.trait(reconstructor, "synthetic"):
            raise InputError(f"--reconstruct {methods.reconstruct} needs --calibration", object="prune")
    _check_pattern(options, methods.sparsifier)
    if options.metric:
        quality.metric(options.metric)


def _check_pattern(options: Options, name: str | None) -> None:
    """Refuse an impossible pattern, and options that need one."""
    if options.pattern is None:
        for option, given in (("--sparsifier", options.sparsifier), ("--permute", options.permute)):
            if given:
                raise InputError("needs --pattern, as in 2:4", object=option)
        return
    NM.parse(options.pattern)
    sparsifier = plugin.build("sparsifiers", str(name))
    if not isinstance(sparsifier, plugin.Sparsifier):
        raise InputError("does not choose weights; nm-mag, nm-wanda and nm-sparsegpt do", object=str(name))
    if plugin.trait(sparsifier, "calibrated") and options.calibration is None:
        raise InputError(f"{name} needs --calibration", object="prune")


def label(options: Options) -> str:
    """What `{target}` in a file name stands for, as in `macs-0.5`."""
    return "_".join(f"{metric}-{value}" for metric, value in options.target.items()) or f"ratio-{options.ratio}"


# The YAML form --------------------------------------------------------------------------------------------------------

SIZE_LIMIT = 1 << 20  # bytes of a recipe


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags that make objects, no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: set[str] = set()
        for key in (str(key.value) for key, _ in node.value):
            if key in keys:
                raise yaml.YAMLError(f"'{key}' is given twice")
            keys.add(key)
        return super().construct_mapping(node, deep)


def recorded(options: Options) -> dict[str, Any]:
    """The options as a recipe has them: keys as on the command line, nothing that is absent."""
    found = dataclasses.asdict(options)
    return {name.replace("_", "-"): value for name, value in found.items() if value not in (None, (), {})}


def dump(options: Options) -> str:
    """The options as YAML that `read` takes back."""
    return yaml.safe_dump(json.loads(json.dumps(recorded(options))), sort_keys=False, allow_unicode=True)


def read(text: bytes, file: str) -> dict[str, Any]:
    """{field of Options: value} of a recipe, checked by type. Raises InputError with the key at fault."""
    if len(text) > SIZE_LIMIT:
        raise InputError(f"larger than {SIZE_LIMIT:,} bytes", file=file)
    try:
        data = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"not a recipe in YAML: {problem}" + (f" (line {mark.line + 1})" if mark else ""),
                         file=file) from None  # fmt: skip
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError("a recipe is one mapping of options", file=file)
    known = [f.name.replace("_", "-") for f in dataclasses.fields(Options)]
    if unknown := [key for key in data if key not in known]:
        raise InputError(f"unknown option; there are {', '.join(known)}", file=file, object=unknown[0])
    named = {key.replace("-", "_"): value for key, value in data.items()}
    try:
        options = TypeAdapter(Options).validate_json(json.dumps(named, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:2]).replace("_", "-")
        raise InputError(first["msg"], file=file, object=where) from None
    return {name: getattr(options, name) for name in named}
