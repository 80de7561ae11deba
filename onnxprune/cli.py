"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxprune import interrupt
from onnxprune.errors import ImpossibleError, InputError, InternalError, PruneError, ours, printable, shown
from onnxprune.limits import MOST_SEED, MOST_THREADS

if TYPE_CHECKING:
    from onnxprune.analysis import Analysis
    from onnxprune.pipeline import Result
    from onnxprune.recipe import Options
    from onnxprune.report import Report, SparsityRow
    from onnxprune.types import Profile, Progress

Command = Callable[..., Any]


def say(text: str = "") -> None:
    """A line of result."""
    click.echo(text)


def say_json(data: Any) -> None:
    """One JSON object, all of stdout."""
    from onnxprune.report import plain

    click.echo(json.dumps(plain(data)))


def warn(text: str) -> None:
    """A warning on stderr."""
    click.echo(f"warning: {printable(text)}", err=True)


def fail(error: PruneError, as_json: bool) -> None:
    """One line on stderr, with --debug after where it arose; with --json the error object is all of stdout."""
    if "--debug" in sys.argv and isinstance(error, InternalError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    if as_json:
        click.echo(json.dumps(error.fields()))
    click.echo(f"onnxprune: error: {error.line()}", err=True)


class Verbs(click.Group):
    """A group whose failures are one line and an exit code, whatever goes wrong."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; click's own usage errors become ours."""
        given = sys.argv[1:] if not args and kwargs.get("args") is None else list((args and args[0]) or kwargs["args"])
        as_json = "--json" in given
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            raise SystemExit(code if isinstance(code, int) else 0)
        except click.exceptions.Abort:  # click's for an interrupt before or after the verb
            click.echo(interrupt.SAID, err=True)
            raise SystemExit(interrupt.CODE) from None
        except click.exceptions.NoArgsIsHelpError:
            fail(InputError("give a verb; 'onnxprune --help' lists them"), as_json)
            raise SystemExit(2) from None
        except click.ClickException as error:
            fail(InputError(error.format_message().replace("\n", " ")), as_json)
            raise SystemExit(2) from None
        except Exception as error:
            found = ours(error)
            fail(found, as_json)
            raise SystemExit(found.code) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Do it; an interrupt is one line here already: click would print an empty one before it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(interrupt.SAID, err=True)
            raise SystemExit(interrupt.CODE) from None


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="onnxprune", prog_name="onnxprune")
def main() -> None:
    """Make exported neural networks smaller and really faster, and prove what was removed."""
    logging.getLogger().addHandler(logging.NullHandler())  # libraries talk to nobody
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Before NumPy loads: a pool for it costs more than it gains, and results would depend on the number of cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def run() -> None:
    """The program: `main`, but the exit code of an interrupted run is 130 whatever else the interrupt met.

    Python ends itself by SIGINT instead where the KeyboardInterrupt passed through a piece of native code on its way.
    Neither this process nor its children take more memory than the machine has to give: the system would choose whom
    to kill.
    """
    if (spare := _spare_memory()) is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = spare if hard == resource.RLIM_INFINITY else min(spare, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    interrupt.insist()
    warnings.simplefilter("ignore")  # of Python and of libraries; ours go another way
    try:
        main()
    except SystemExit as end:
        if end.code != interrupt.CODE:
            interrupt.hear(signal.SIG_IGN)  # it is done, and only has to go
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(interrupt.CODE)


SPARE = 0.9  # of the memory that is free


def _spare_memory() -> int | None:
    """Bytes that this machine, or the container that we are in, has left; None where nobody says so."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(most) - int(used))
    return int(SPARE * max(min(found), 0)) if found else None


def common(command: Command) -> Command:
    """Options that every verb has."""

    @click.option("--json", "as_json", is_flag=True, help="Results as one JSON object on stdout.")
    @click.option("--debug", is_flag=True, help="Show where an internal error happened.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @click.option("-q", "--quiet", is_flag=True, help="Print results only.")
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("debug")
        return command(*args, **kwargs)

    return wrapped


SEED, THREADS = click.IntRange(0, MOST_SEED), click.IntRange(1, MOST_THREADS)


class Positive(click.FloatRange):
    """A number above zero, which NaN is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises BadParameter."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail("nan is no number", param, ctx)
        return found


SECONDS = Positive(0, min_open=True)
PRECISION = click.option(
    "--precision", default="fp32", show_default=True, metavar="fp32|fp16|bf16|int8", help="What it computes in."
)


def _check_scales(precision: str, calibration: str | None) -> None:
    if precision == "int8" and calibration is None:
        warn("the scales of int8 come from random inputs; pass --calibration")


def _print_kept(kept: tuple[str, ...], precision: str, verbose: bool) -> None:
    if kept:
        some = ", ".join(map(shown, kept if verbose else kept[:3])) + ("" if verbose or len(kept) <= 3 else ", ...")
        say(f"{len(kept)} operators that {precision} does not suit stay in fp32: {some}")


def parse_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """{input: shape} from NAME:1x3x224x224, NAME:[1,3,224,224] or NAME:1,3,224,224."""
    found = {}
    for text in texts:
        name, colon, sizes = text.rpartition(":")
        parts = re.split(r"[x,]", sizes.strip().strip("[]()"))
        if not colon or not all(re.fullmatch(r" *0*[1-9][0-9]{0,8} *", part) for part in parts):
            raise InputError("expected NAME:1x3x224x224", object=f"--input-shape {text}")
        if name in found:
            raise InputError("this input has a shape already", object=f"--input-shape {text}")
        found[name] = tuple(int(part) for part in parts)
    return found


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError("expected numbers between commas, as in 0.25,0.5", object=f"{option} {text}") from None


def parse_profiles(texts: tuple[str, ...]) -> dict[str, Profile]:
    """{input: profile} from NAME:SIZES, or NAME:MIN..OPT..MAX, sizes as `parse_shapes` takes them."""
    from onnxprune.types import Profile

    found = {}
    for text in texts:
        name, colon, sizes = text.rpartition(":")
        parts = sizes.split("..")
        if not colon or len(parts) not in (1, 3):
            raise InputError("expected NAME:1x3x224x224, or NAME:MIN..OPT..MAX", object=f"--input-shape {text}")
        shapes = [parse_shapes((f"{name}:{part}",))[name] for part in parts]
        if name in found:
            raise InputError("this input has a profile already", object=f"--input-shape {text}")
        found[name] = Profile(shapes[0], shapes[len(shapes) // 2], shapes[-1])
    return found


def parse_targets(texts: tuple[str, ...]) -> list[dict[str, str]]:
    """Targets of each variant: METRIC=VALUE, repeatable; one metric may list several values for a family."""
    variants: list[dict[str, str]] = [{}]
    for text in texts:
        metric, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",")]
        if not equals or not all(listed):
            raise InputError("expected METRIC=VALUE, as in macs=0.5", object=f"--target {text}")
        if metric in variants[0]:
            raise InputError("this metric has a target already", object=f"--target {text}")
        if len(listed) > 1 and len(variants) > 1:
            raise InputError("only one metric may list several values", object=f"--target {text}")
        variants = [{**variant, metric: value} for variant in variants for value in listed]
    return variants


@contextmanager
def stages(hidden: bool) -> Iterator[Progress]:
    """A line on stderr that names the stage, its time, and what is left where that is known; on a terminal only.

    From here on there is something to clean up. Not before: an interrupt that is raised while native modules load can
    crash them.
    """
    from onnxprune.types import quietly

    interrupt.hear(interrupt.unwind)
    if hidden or not sys.stderr.isatty():
        yield quietly
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.SpinnerColumn(), rich.TextColumn("{task.description}", markup=False), rich.TimeElapsedColumn(),
               rich.TextColumn("{task.fields[left]}"))  # fmt: skip
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", left="")

        last = 0

        def told(stage: str, done: int = 0, total: int = 0) -> None:
            nonlocal last
            if (text := printable(stage)) != bar.tasks[0].description or done < last:  # another, or the same anew
                bar.reset(task, description=text)
            last = done
            elapsed = bar.tasks[0].elapsed or 0.0
            left = f"{done} of {total}, {time_left(elapsed, done, total)}" if total else ""
            bar.update(task, left=left)

        yield told


def time_left(elapsed: float, done: int, total: int) -> str:
    """What is left to wait, going by what was done in so many seconds."""
    if not done:
        return "time left unknown"
    minutes, seconds = divmod(round(elapsed / done * max(total - done, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def table(title: str, columns: list[str], rows: list[tuple[object, ...]]) -> None:
    """A table on stdout; numbers lean right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title) if title else None, title_justify="left", box=None, header_style="bold")
    for k, name in enumerate(columns):
        right = bool(rows) and all(re.fullmatch(r"-?[\d,.%e+]*", str(row[k])) for row in rows)
        drawn.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))  # names may look like markup
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(drawn)


OPTIONS: dict[str, dict[str, Any]] = {
    "ratio": {"type": float, "help": "Share of the units of every group that goes, 0 <= R < 1."},
    "target": {
        "multiple": True,
        "metavar": "METRIC=VALUE",
        "help": "macs, params, size or latency: share that stays, or 40MB, 8ms.",
    },
    "remove": {
        "default": "channels,heads",
        "show_default": True,
        "help": "Kinds of unit, comma separated, or all.",
    },
    "approximate": {"is_flag": True, "help": "Consent to touch groups whose positions mix."},
    "criterion": {"metavar": "NAME[,key=value]", "help": "Importance.  [default: the best that the data allows]"},
    "allocate": {"metavar": "NAME[,key=value]", "help": "How the budget is spread.  [default: likewise]"},
    "reconstruct": {"metavar": "NAME|none", "help": "How what stays is repaired.  [default: likewise]"},
    "effort": {
        "default": "default",
        "metavar": "quick|default|thorough",
        "show_default": True,
        "help": "Time for quality.",
    },
    "no-new-bias": {"is_flag": True, "help": "Repair adds no bias where the layer had none."},
    "memory": {"default": "3GB", "show_default": True, "metavar": "SIZE", "help": "For weights of models that run."},
    "cache": {
        "metavar": "DIR",
        "help": "Where statistics, trials and latencies are kept.  [default: the user's cache folder]",
    },
    "no-cache": {"is_flag": True, "help": "Keep nothing, and look nothing up."},
    "calibration": {"metavar": "PATH", "help": ".npz, .npy or a folder: unlabelled inputs."},
    "evaluation": {"metavar": "PATH", "help": ".npz with held-out inputs, and labels."},
    "metric": {"help": "accuracy, agreement, cosine or relative-error."},
    "round-to": {"default": "auto", "show_default": True, "metavar": "N", "help": "Keep multiples of N positions."},
    "pattern": {"metavar": "N:M", "help": "Then leave N of every M weights along the axis that is summed over."},
    "sparsifier": {
        "metavar": "NAME[,key=value]",
        "help": "How those are chosen.  [default: the best that the data allows]",
    },
    "permute": {"is_flag": True, "help": "Bring channels into an order in which N:M costs less."},
    "ignore": {"multiple": True, "metavar": "GLOB", "help": "Nodes or initializers that stay as they are."},
    "min-keep": {"type": int, "default": 1, "show_default": True, "help": "Fewest units left in a group."},
    "input-shape": {
        "multiple": True,
        "metavar": "NAME:1x3x224x224",
        "help": "Fix a dynamic input for cost and calibration.",
    },
    "precision": {
        "default": "fp32",
        "show_default": True,
        "metavar": "fp32|fp16",
        "help": "What the result computes in.",
    },
    "backend": {"default": "cpu", "show_default": True, "help": "Where latency is measured."},
    "no-measure": {"is_flag": True, "help": "Do not measure latency."},
    "recipe": {"metavar": "FILE", "help": "These options as YAML; the command line wins."},
    "strict": {"is_flag": True, "help": "Fail if an operator has no rule."},
    "unproven": {"is_flag": True, "help": "Write even what ONNX Runtime cannot run."},
    "seed": {"type": int, "default": 0, "show_default": True},
    "threads": {"type": int, "default": 1, "show_default": True},
    "timeout": {
        "type": SECONDS,
        "default": 600.0,
        "show_default": True,
        "help": "Seconds that one execution may take.",
    },
    "dry-run": {"is_flag": True, "help": "Print the plan, write nothing."},
    "force": {"is_flag": True, "help": "Replace an existing output."},
    "allow-interface-change": {
        "is_flag": True,
        "help": "KV-cache inputs and outputs may go with the layer that they serve, or lose heads.",
    },
    "report": {"multiple": True, "metavar": "PATH", "help": "Report as .json, .md or .html."},
}  # that several verbs share
PRUNING = [name for name in OPTIONS if name != "report"]  # fields of recipe.Options
WRITING = "report strict unproven seed threads timeout dry-run force".split()


def takes(*names: str) -> Callable[[Command], Command]:
    """Options of OPTIONS, in this order in the help."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = click.option(f"--{name}", **OPTIONS[name])(command)
        return command

    return add


@main.command()
@click.argument("model")
@click.option("-o", "--output", metavar="PATH", help="Where to write; {target} stands for each target of a family.")
@takes(*PRUNING)
@takes("report")
@click.option("--save-recipe", metavar="FILE", help="Write the options of this run as YAML.")
@common
def prune(model: str, **given: Any) -> None:
    """Score, select, remove, prove, measure and write."""
    from onnxprune import pipeline, recipe

    if given["output"] is None:
        raise InputError("say where to write with -o", object="prune")
    variants = _variants(given)
    names = [recipe.label(variant) for variant in variants]
    if len(variants) > 1:
        for path in (given["output"], *given["report"]):
            if "{target}" not in path:
                raise InputError("several targets need {target} in the file's name", object=path)
    outputs = [given["output"].replace("{target}", name) for name in names]
    beside = [[path.replace("{target}", name) for path in given["report"]] for name in names]
    texts: dict[str | Path, str] = {}
    if (saved := given["save_recipe"]) is not None:
        whole = {k: ",".join(dict.fromkeys(str(v.target[k]) for v in variants)) for k in variants[0].target}
        texts[saved] = recipe.dump(replace(variants[0], target=whole))
    told: dict[str, Any] = {"texts": texts, "inputs": _recipes(given), "command": sys.argv[1:]}
    with stages(given["quiet"] or given["as_json"]) as progress:
        results = pipeline.family(model, outputs, variants, beside, progress=progress, **told)
    for text in dict.fromkeys(text for result in results for text in result.report.warnings):
        warn(text)
    if given["as_json"]:
        data = [result.report.data() for result in results]
        say_json(data[0] if len(data) == 1 else {"family": data})
        return
    for result, output in zip(results, outputs, strict=True):
        _print_result(result.report, output, variants[0].dry_run, given["verbose"])


@main.command()
@click.argument("models")
@click.option(
    "-o", "--output", metavar="DIR", help="Where models and their reports are written, under their old names."
)
@takes(*PRUNING)
@common
def batch(models: str, **given: Any) -> None:
    """Prune every model of a folder, or of a text file with a path in each line, by one recipe.

    A model that cannot be pruned does not stop the others; the exit code is the largest of theirs.
    """
    from onnxprune import batch as verb

    if given["output"] is None:
        raise InputError("say where to write with -o", object="batch")
    variants = _variants(given)
    if len(variants) > 1:
        raise InputError("one target at a time", object="batch")
    with stages(given["quiet"] or given["as_json"]) as progress:
        rows = verb.batch(models, given["output"], variants[0], _recipes(given), progress, sys.argv[1:])
    if given["as_json"]:
        say_json({"models": [row.data() for row in rows]})
    else:
        table("", ["model", "params", "MACs", "latency", "result"], [row.cells() for row in rows])
    for row in rows:
        for text in row.report.warnings if row.report is not None else ():
            warn(f"{row.model}: {text}")
        if row.error is not None:
            fail(row.error, as_json=False)
    if code := max((row.error.code for row in rows if row.error is not None), default=0):
        raise SystemExit(code)


@main.command()
@click.argument("model")
@click.option("-o", "--output", metavar="PATH", help="Where to write.")
@click.option(
    "--tolerance",
    type=float,
    default=1e-6,
    show_default=True,
    help="What counts as zero: a slice up to this share of the median one of its group.",
)
@click.option("--no-new-bias", is_flag=True, help="Units whose constant no bias can take stay.")
@takes("approximate", "ignore", "input-shape", "backend", "no-measure", *WRITING)
@common
def realize(model: str, **given: Any) -> None:
    """Make the smaller network of a model that some training left with zeros, masks or dead units."""
    from onnxprune import realize as verb

    result, output = _written("realize", verb.realize, model, given)
    if result is not None:
        _print_result(result.report, output, given["dry_run"], given["verbose"])
        for text in result.report.rewrites if given["verbose"] else ():
            say(shown(text))


def _written(name: str, make: Callable[..., Result], model: str, given: dict[str, Any]) -> tuple[Result | None, str]:
    """(what a verb that writes one model made, its output); None where it was said as JSON."""
    kept = {key: value for key, value in given.items() if key not in ("output", "quiet", "as_json", "verbose")}
    if given["output"] is None:
        raise InputError("say where to write with -o", object=name)
    kept["measure"] = not kept.pop("no_measure")
    kept["input_shape"] = parse_shapes(kept["input_shape"])
    with stages(given["quiet"] or given["as_json"]) as progress:
        result = make(model, given["output"], progress=progress, command=sys.argv[1:], **kept)
    for text in result.report.warnings:
        warn(text)
    if given["as_json"]:
        say_json(result.report.data())
    return None if given["as_json"] else result, given["output"]


@main.command()
@click.argument("model")
@click.option("-o", "--output", metavar="PATH", help="Where to write.")
@click.option("--pattern", default="2:4", show_default=True, metavar="N:M", help="N of every M weights stay.")
@click.option(
    "--criterion",
    metavar="NAME[,key=value]",
    help="nm-mag, nm-wanda or nm-sparsegpt.  [default: the best that the data allows]",
)
@click.option("--reconstruct", metavar="admm|none", help="Repair of what is kept.  [default: admm, given data]")
@takes("permute", "calibration", "evaluation", "metric", "memory", "cache", "no-cache", "ignore", "input-shape")
@takes("backend", "no-measure")
@takes(*WRITING)
@common
def sparsify(model: str, **given: Any) -> None:
    """N:M weights, and a table of the layers for which a sparse kernel is to be expected."""
    from onnxprune import sparsify as verb

    result, output = _written("sparsify", verb.sparsify, model, given)
    if result is not None:
        _print_result(result.report, output, given["dry_run"], given["verbose"], layers=True)


def _print_sparsity(row: SparsityRow, whole: bool) -> None:
    """The table of layers, and what share of the work a sparse kernel is to be expected for."""
    from onnxprune import report as reports

    if whole:
        table(f"{row.pattern}, layer by layer", [*reports.LAYERS], [*reports.layers(row)])
    count = sum(layer.sparse for layer in row.layers)
    time = "" if row.kernel_time is None else f", which take {row.kernel_time:.1%} of the time"
    say(f"{row.pattern} in {count} layers with {row.sparse_macs:.1%} of the MACs, by {row.criterion}; "
        f"a sparse kernel is to be expected for {row.kernel_macs:.1%}{time}")  # fmt: skip


def _print_result(report: Report, output: str, dry_run: bool, verbose: bool, layers: bool = False) -> None:
    """Before and after, with -v or in a dry run groups and layers, and how far the proof's outputs differ."""
    from onnxprune import report as reports

    table(f"{'would write' if dry_run else 'wrote'} {shown(output)}", ["", "dense", "pruned", "ratio"],
          [*reports.table(report)])  # fmt: skip
    if dry_run or verbose:
        _print_groups([(g.id, g.kind, g.before, g.after) for g in report.groups], report.frozen)
    if report.sparsity is not None:
        _print_sparsity(report.sparsity, dry_run or verbose or layers)
    proof = report.verification
    worst = max((d["relative"] for d in proof.differences), default=0.0)
    say(f"proven on {proof.inputs} inputs: largest relative difference {worst:.1e}" if proof.proven else "UNPROVEN")


def _print_groups(rows: list[tuple[object, ...]], frozen: list[Any]) -> None:
    table("groups", ["group", "kind", "units", "left"], rows)
    _print_frozen([(f.axis, f.reason, f.parameters) for f in frozen])


def _print_frozen(rows: list[tuple[str, str, int]]) -> None:
    """Reasons by how many parameters they hold back."""
    reasons: dict[str, tuple[int, int, str]] = {}
    for axis, reason, parameters in rows:
        count, total, first = reasons.get(reason, (0, 0, axis))
        reasons[reason] = (count + 1, total + parameters, first)
    ordered = sorted(reasons.items(), key=lambda item: -item[1][1])
    table(
        "stays",
        ["reason", "axes", "parameters", "for example"],
        [(shown(reason), count, f"{total:,}", shown(first)) for reason, (count, total, first) in ordered],
    )


def _recipes(given: dict[str, Any]) -> list[str]:
    """The recipe that was read, if there was one."""
    return [given["recipe"]] if given["recipe"] is not None else []


def _variants(given: dict[str, Any]) -> list[Options]:
    """The options of each target: defaults, then the recipe, then what the command line says."""
    from onnxprune import recipe
    from onnxprune.storage import read_bytes

    context = click.get_current_context()
    path = given["recipe"]
    values = recipe.read(read_bytes(path, recipe.SIZE_LIMIT), path) if path is not None else {}
    said = {k for k in given if context.get_parameter_source(k) is ParameterSource.COMMANDLINE}
    if said & {"ratio", "target"}:  # they exclude each other
        values = {k: v for k, v in values.items() if k not in ("ratio", "target")}
    for field in fields(recipe.Options):
        if field.name in said:
            values[field.name] = given[field.name]
    if "no_measure" in said:
        values["measure"] = False
    if "remove" in said:
        values["remove"] = tuple(kind.strip() for kind in given["remove"].split(","))
    if "input_shape" in said:
        values["input_shape"] = parse_shapes(given["input_shape"])
    target = values.pop("target", ())
    texts = target if isinstance(target, tuple) else tuple(f"{metric}={value}" for metric, value in target.items())
    return [recipe.Options(**values, target=target) for target in parse_targets(texts)]


@main.command()
@click.argument("model")
@click.option("--head-dim", is_flag=True, help="Cut axes of heads inside every head, as --remove head-dim does.")
@click.option("--width", is_flag=True, help="Cut norm groups (GroupNorm) inside every group, as --remove width does.")
@takes("input-shape")
@common
def inspect(
    model: str, head_dim: bool, width: bool, input_shape: tuple[str, ...], as_json: bool, verbose: bool, quiet: bool
) -> None:
    """What a model is, what can be removed, what stays and why."""
    from onnxprune.analysis import Analysis, cost_of

    remove = [kind for kind, given in (("head-dim", head_dim), ("width", width)) if given]
    analysis = Analysis(model, parse_shapes(input_shape), remove=remove)
    cost = cost_of(analysis.dense, analysis.given, analysis.source.bytes)
    frozen = analysis.frozen([g for g in analysis.groups if g.exact])
    if as_json:
        say_json(_inspected(analysis, cost, frozen))
        return
    say(f"{shown(analysis.source.path)}: {cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes")
    table(
        "groups",
        ["group", "kind", "units", "exact", "nodes"],
        [
            (g.id, g.kind, len(g.units), "exact" if g.exact else "mixing", shown(", ".join(g.nodes)))
            for g in analysis.groups
        ],
    )
    _print_frozen([(str(f.axis), f.reason, f.parameters) for f in frozen])


def _inspected(analysis: Analysis, cost: Any, frozen: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": {"path": str(analysis.source.path), "sha256": analysis.source.sha256, **asdict(cost)},
        "sizes": dict(analysis.prepared.sizes),
        "groups": [
            {
                "id": g.id,
                "kind": g.kind,
                "exact": g.exact,
                "units": len(g.units),
                "mixing": list(g.mixing),
                "nodes": list(g.nodes),
                "members": [{"initializer": m.initializer, "axis": m.axis, "role": m.role} for m in g.members],
            }
            for g in analysis.groups
        ],
        "frozen": [{"axis": str(f.axis), "reason": f.reason, "parameters": f.parameters} for f in frozen],
        "unknown": dict(analysis.dims.relations.unknown),
    }


@main.command()
@click.argument("model")
@click.argument("a")
@click.argument("b")
@common
def explain(model: str, a: str, b: str, as_json: bool, verbose: bool, quiet: bool) -> None:
    """The shortest chain of ops that couples two axes, VALUE:AXIS each, or why there is none."""
    from onnxprune import verbs
    from onnxprune.analysis import Analysis

    chain, reasons = verbs.explain(Analysis(model), a, b)
    if as_json:
        steps = [{"from": str(x), "op": op, "to": str(y)} for x, op, y in chain or ()]
        say_json({"coupled": chain is not None, "steps": steps, "frozen": reasons})
        return
    if chain is None:
        say(f"not coupled: no chain of ops connects {shown(a)} and {shown(b)}")
    for x, op, y in chain or ():
        say(f"{shown(x)}  --[{shown(op)}]--  {shown(y)}")
    for axis, reason in reasons.items():
        say(f"{shown(axis)} stays: {shown(reason)}")


@main.command()
@click.argument("dense")
@click.argument("pruned")
@takes("evaluation", "metric", "timeout")
@click.option("--max-relative-error", type=float, metavar="X", help="Fail (exit 3) above this output difference.")
@takes("input-shape")
@click.option("--seed", type=SEED, default=0, show_default=True)
@common
def compare(dense: str, pruned: str, as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """Output differences between two models, and task quality where there are labels."""
    from onnxprune import verbs

    shapes = parse_shapes(given["input_shape"])
    with stages(quiet or as_json) as progress:
        found = verbs.compare_models(
            dense, pruned, given["evaluation"], given["metric"], shapes, given["seed"], given["timeout"], progress
        )
    limit = given["max_relative_error"]
    if limit is not None and not limit >= 0:
        raise InputError("a number of at least 0", object="--max-relative-error")
    failed = limit is not None and not found["relative-error"] <= limit
    if as_json and not failed:
        say_json(found)
    elif not as_json:
        rows = []
        for name, value in found.items():
            if isinstance(value, dict):
                rows.append((name, f"{value['dense']:.6g}", f"{value['pruned']:.6g}"))
            else:
                rows.append((name, "", f"{value:.6g}" if isinstance(value, float) else str(value)))
        table("", ["", "dense", "pruned"], [*rows])
    if failed:
        error = ImpossibleError(f"relative error {found['relative-error']:.4g} is above {limit:g}", file=pruned)
        if not as_json:
            raise error
        say_json(found | error.fields())
        click.echo(f"onnxprune: error: {error.line()}", err=True)
        raise SystemExit(error.code)


@main.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--plan", required=True, metavar="REPORT", help="The JSON report of the run that wrote PRUNED.")
@takes("input-shape", "timeout")
@click.option("--seed", type=SEED, default=0, show_default=True)
@common
def verify(dense: str, pruned: str, plan: str, as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """Repeat the proof from the report, without trusting the run that wrote it."""
    from onnxprune import audit

    shapes = parse_shapes(given["input_shape"])
    with stages(quiet or as_json) as progress:
        found = audit.verify(dense, pruned, plan, shapes, given["seed"], given["timeout"], progress)
    if as_json:
        say_json(found)
    else:
        rows = [(shown(d["output"]), f"{d['relative']:.1e}", f"{d['tolerance']:.0e}") for d in found["differences"]]
        table("proven", ["output", "relative difference", "tolerance"], [*rows])


@main.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--backend", default="cpu", show_default=True)
@click.option("--threads", type=THREADS, default=1, show_default=True)
@click.option("--rounds", type=int, default=30, show_default=True)
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Most time to spend.")
@click.option("--trust-engine", is_flag=True, help="Run engines that others built: they are native code.")
@takes("input-shape", "timeout")
@common
def measure(models: tuple[str, ...], as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """Latency of one or more models, interleaved, with spread; ratios to the first."""
    from dataclasses import asdict

    from onnxprune import verbs

    given["input_shape"] = parse_shapes(given["input_shape"])
    with stages(quiet or as_json) as progress:
        rows = verbs.measure_models(models, progress=progress, **given)
    ratios = [row.cpu_ms / rows[0].cpu_ms if rows[0].cpu_ms else float("nan") for row in rows]
    if as_json:
        data = [{"path": m, **asdict(r), "ratio": q} for m, r, q in zip(models, rows, ratios, strict=True)]
        say_json({"models": data})
        return
    table(
        f"{rows[0].backend}, {rows[0].threads} thread(s), {rows[0].rounds} rounds",
        ["model", "CPU ms", "wall ms", "spread", "ratio"],
        [
            (shown(m), f"{r.cpu_ms:.3f}", f"{r.wall_ms:.3f}", f"{r.spread:.1%}", f"{q:.3f}")
            for m, r, q in zip(models, rows, ratios, strict=True)
        ],
    )


@main.command()
@click.argument("model")
@click.option("-o", "--output", metavar="PATH", help="Where to write: .ort, .xml (with a .bin beside it) or .onnx.")
@click.option("--to", metavar="ort|openvino|onnx", help="The format; onnx fixes shapes and sets the precision.")
@PRECISION
@takes("calibration")
@takes("input-shape")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--threads", type=THREADS, default=1, show_default=True)
@click.option("--timeout", type=SECONDS, default=600.0, show_default=True, help="Seconds that one execution may take.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
def export(model: str, as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """Write an edge format, checked by running it: ORT format, OpenVINO IR, or ONNX at fixed sizes."""
    from onnxprune import export as verb

    output, to = given.pop("output"), given.pop("to")
    if output is None or to is None:
        raise InputError("say where to write with -o, and what with --to", object="export")
    given["input_shape"] = parse_shapes(given["input_shape"])
    _check_scales(given["precision"], given["calibration"])
    with stages(quiet or as_json) as progress:
        found = verb.export(model, output, to, progress=progress, **given)
    if as_json:
        say_json({
            "files": [str(path) for path in found.files],
            "bytes": found.bytes,
            "backend": found.backend,
            "data": found.data,
            **found.difference.data(),
            "precision": given["precision"],
            "kept": list(found.kept),
        })  # fmt: skip
        return
    files = ", ".join(shown(path) for path in found.files)
    say(f"wrote {files}: {found.bytes:,} bytes; {found.difference} on {found.backend}, {found.data}")
    _print_kept(found.kept, given["precision"], verbose)


@main.command()
@click.argument("model")
@click.option("-o", "--output", metavar="PATH", help="Where to write: .engine or .plan; a record goes to PATH.json.")
@click.option("--backend", default="tensorrt-rtx", show_default=True, metavar="tensorrt|tensorrt-rtx")
@PRECISION
@click.option("--sparse", is_flag=True, help="Let it take kernels for 2:4 weights.")
@click.option(
    "--input-shape",
    multiple=True,
    metavar="NAME:SIZES",
    help="Sizes of a dynamic input: 1x3x224x224, or the range MIN..OPT..MAX, as in x:1x3..4x3..8x3.",
)
@takes("calibration")
@click.option("--timing-cache", metavar="FILE", help="Measurements of kernels, read and written back.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--threads", type=THREADS, default=1, show_default=True)
@click.option("--timeout", type=SECONDS, default=3600.0, show_default=True, help="Seconds that one step may take.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
def build(model: str, as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """Build a TensorRT or TensorRT-RTX engine; without a GPU as well where the library can (TensorRT-RTX)."""
    from onnxprune import engines as verb

    output = given.pop("output")
    if output is None:
        raise InputError("say where to write with -o", object="build")
    profiles, to = parse_profiles(given.pop("input_shape")), given.pop("precision")
    _check_scales(to, given["calibration"])
    with stages(quiet or as_json) as progress:
        found = verb.build(model, output, profiles, to=to, progress=progress, command=sys.argv[1:], **given)
    if as_json:
        say_json(found.record)
        return
    record = found.record
    say(f"wrote {', '.join(shown(path) for path in found.files)}: {record['engine']['bytes']:,} bytes; "
        f"{found.difference} on {record['difference']['backend']}, {record['difference']['data']}")  # fmt: skip
    _print_kept(tuple(record["kept"]), to, verbose)


@main.command()
@click.argument("model")
@click.option(
    "--levels", default="0.25,0.5,0.75", show_default=True, metavar="R,R,...", help="Shares of a group's units that go."
)
@click.option("--reconstruct", metavar="NAME", help="Give the error after repair as well, on other data than its own.")
@click.option("--backend", metavar="NAME", help="Give gains in latency as well, from operators measured there.")
@click.option("--csv", metavar="FILE", help="Write the table as CSV.")
@click.option("--plot", metavar="FILE", help="Draw it: .png, .svg or .html.")
@takes("remove", "approximate", "criterion", "calibration", "memory", "cache", "no-cache", "ignore", "min-keep")
@takes("input-shape", "strict", "seed", "threads", "timeout", "force")
@common
def sensitivity(model: str, as_json: bool, verbose: bool, quiet: bool, **given: Any) -> None:
    """What removing part of each group by itself costs in output error, and what it gains."""
    from onnxprune import sensitivity as verb

    given["remove"] = tuple(kind.strip() for kind in given["remove"].split(","))
    given["levels"] = parse_numbers(given["levels"], "--levels")
    given["input_shape"] = parse_shapes(given["input_shape"])
    with stages(quiet or as_json) as progress:
        found = verb.sensitivity(model, progress=progress, **given)
    if given["calibration"] is None:
        warn("errors are those on random inputs; pass --calibration")
    for text in found.warnings:
        warn(text)
    if as_json:
        say_json(found.data_of())
        return
    table("", *found.table())
    fitted = " that repair was not fitted to" if found.held_out else ""
    say(f"error: relative error of the outputs on {found.inputs} feeds of {found.data}{fitted}; "
        "macs, params, latency: the share of the dense model's that goes")  # fmt: skip


WHAT = ["criteria", "allocators", "reconstructors", "sparsifiers", "passes", "backends", "ops"]


@main.command("list")
@click.argument("what", type=click.Choice(WHAT))
@common
def list_(what: str, as_json: bool, verbose: bool, quiet: bool) -> None:
    """What is installed, with one line of help each."""
    from onnxprune import verbs

    rows = verbs.rows(what)
    if as_json:
        say_json({what: [{"name": name, "help": text} for name, text in rows]})
        return
    table("", ["name", "help"], [*rows])
