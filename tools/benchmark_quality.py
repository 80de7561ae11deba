"""One-shot quality at equal MACs, ours and the peers': python tools/benchmark_quality.py FOLDER.

FOLDER is what tools/digits.py wrote. Every measured model becomes one line of JSON in FOLDER/rows.jsonl as soon as it
is known, so that a killed run goes on where it was; of two lines about the same model the later one counts. MACs are
those that onnxprune counts. An arm of ours of which a name is not installed is listed as such and tried again later.
Prints Markdown, progress on stderr.

    python tools/benchmark_quality.py FOLDER --arms default,quick         ours alone
    python tools/benchmark_quality.py FOLDER --arms 'tp *,onnxsim *'      the peers alone
    python tools/benchmark_quality.py FOLDER --arms default --again       measured anew
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import peers
import torch
from digits import seeds_of
from numpy.typing import NDArray
from peers import Case, count_macs
from scipy import stats

import onnxprune

OURS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "quick": {"effort": "quick"},
    "thorough": {"effort": "thorough"},
    "random uniform lsq": {"criterion": "random-erk", "allocate": "uniform", "reconstruct": "lsq"},
    "mag uniform": {"criterion": "mag", "allocate": "uniform", "reconstruct": "none"},
    "mag global": {"criterion": "mag", "allocate": "global-rank", "reconstruct": "none"},
    "mag uniform bias": {"criterion": "mag", "allocate": "uniform", "reconstruct": "bias-comp"},
    "mag global norms": {"criterion": "mag", "allocate": "global-rank", "reconstruct": "bn-reest"},
    "mag uniform obspa": {"criterion": "mag", "allocate": "uniform", "reconstruct": "obspa"},
    "activation global lsq": {"criterion": "act-mean", "allocate": "global-rank", "reconstruct": "lsq"},
    "fluctuation (FLAP)": {"criterion": "fluct", "allocate": "flap-std", "reconstruct": "bias-comp"},
    "wanda uniform lsq": {"criterion": "wanda-sp", "allocate": "uniform", "reconstruct": "lsq"},
    "goa global lsq": {"criterion": "goa", "allocate": "global-rank", "reconstruct": "lsq"},
    "hap knapsack lsq": {"criterion": "hap", "allocate": "knapsack", "reconstruct": "lsq"},
    "fisher mask search": {"criterion": "fisher-mask", "allocate": "mask-search", "reconstruct": "mask-tune"},
    "bonsai global lsq": {"criterion": "bonsai", "allocate": "global-rank", "reconstruct": "lsq"},
    "random uniform sequential": {"criterion": "random-erk", "allocate": "uniform", "reconstruct": "sequential"},
    "mag uniform sequential": {"criterion": "mag", "allocate": "uniform", "reconstruct": "sequential"},
    "obs uniform sequential": {"criterion": "obs-struct", "allocate": "uniform", "reconstruct": "sequential"},
    "obs global sequential": {"criterion": "obs-struct", "allocate": "global-rank", "reconstruct": "sequential"},
    "obs uniform lsq": {"criterion": "obs-struct", "allocate": "uniform", "reconstruct": "lsq"},
    "obs rd-dp lsq": {"criterion": "obs-struct", "allocate": "rd-dp", "reconstruct": "lsq"},
    "obs evolution obs-block": {"criterion": "obs-struct", "allocate": "darwin-evo", "reconstruct": "obs-block"},
}
EQUAL = 0.01  # MACs, as a share of the dense network's, by which an arm may miss the wanted number and still compare
CUTS = "0.3,0.5,0.7,0.8,0.9,0.95"

Row = dict[str, Any]


# Ours -----------------------------------------------------------------------------------------------------------------


def ours(options: Mapping[str, str], case: Case, wanted: float) -> dict[str, onnx.ModelProto]:
    """One run of the library call, to a share of the MACs, single units allowed."""
    known = {field.name for field in fields(onnxprune.Options)}
    if unknown := set(options) - known:
        raise onnxprune.InputError("unknown option", object=", ".join(sorted(unknown)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small.onnx"
        onnxprune.prune(
            case.dense,
            out,
            target={"macs": wanted / count_macs(case.dense)},
            remove=("all",),
            approximate=True,
            calibration=str(case.folder / "calibration.npz"),
            round_to=1,
            measure=False,
            seed=case.seed,
            no_cache=True,
            **options,
        )
        return {"": onnx.load(out)}


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What pruned networks are held against: images, their labels, the dense network's logits and cost."""

    images: NDArray
    labels: NDArray
    logits: NDArray
    macs: int


def logits_of(model: onnx.ModelProto, images: NDArray) -> NDArray:
    """float64[n, 10] on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": images})[0], np.float64)


def log_softmax(logits: NDArray) -> NDArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def measure(model: onnx.ModelProto, truth: Truth) -> Row:
    """MACs as a share of the dense ones, accuracy, mean KL(dense || pruned), which images are right (bits, in hex)."""
    found = logits_of(model, truth.images)
    right = found.argmax(axis=1) == truth.labels
    wanted = log_softmax(truth.logits)
    divergence = (np.exp(wanted) * (wanted - log_softmax(found))).sum(axis=1)
    return {
        "macs": count_macs(model) / truth.macs,
        "accuracy": float(right.mean()),
        "kl": float(divergence.mean()),
        "right": np.packbits(right).tobytes().hex(),
    }


def measured(arm: str, run: peers.Arm, case: Case, truth: Truth, cut: float) -> list[Row]:
    """A row for each model that the arm gives, or one that says why it gives none."""
    key = {"network": case.network, "seed": case.seed, "cut": cut}
    started = time.perf_counter()
    try:
        models = run(case, (1 - cut) * truth.macs)
    except onnxprune.InputError as error:  # a name or option that is not there
        return [key | {"arm": arm, "missing": f"{error.object}: {error.message}"}]
    except Exception as error:  # a peer's own failure is a result too
        return [key | {"arm": arm, "failed": f"{type(error).__name__}: {error}"[:300]}]
    seconds = round(time.perf_counter() - started, 2)
    return [key | {"arm": arm + suffix, "seconds": seconds} | measure(m, truth) for suffix, m in models.items()]


# The table ------------------------------------------------------------------------------------------------------------


def compares(row: Row) -> bool:
    """Whether the row has a model with about the wanted MACs."""
    return "accuracy" in row and abs(row["macs"] - (1 - row["cut"])) <= EQUAL


def right_of(row: Row, images: int) -> NDArray:
    """float64[images]: 1 where the row's model was right."""
    packed = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(packed)[:images].astype(np.float64)


def cell(rows: Sequence[Row], dense: Mapping[int, float], figure: str) -> str:
    """Mean over seeds: points of accuracy below dense, or KL. A star: MACs beyond EQUAL; words where there is none."""
    if words := [r for r in rows if "accuracy" not in r]:
        return "not installed" if "missing" in words[0] else "fails"
    if not rows:
        return ""
    star = "" if all(map(compares, rows)) else "\\*"
    if figure == "kl":
        return f"{np.mean([r['kl'] for r in rows]):.4f}{star}"
    return f"{100 * np.mean([dense[r['seed']] - r['accuracy'] for r in rows]):.2f}{star}"


def difference(first: Sequence[Row], second: Sequence[Row], images: int) -> tuple[float, float, float]:
    """Points by which the first is better, with the 95 % interval over images, each averaged over the seeds."""
    pairs = [(a, b) for a in first for b in second if a["seed"] == b["seed"]]
    gaps = 100 * np.mean([right_of(a, images) - right_of(b, images) for a, b in pairs], axis=0)
    if not gaps.any():
        return 0.0, 0.0, 0.0
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    return float(gaps.mean()), float(interval.low), float(interval.high)


def table(rows: Sequence[Row], network: str, seeds: Sequence[int], truths: Mapping[tuple[str, int], Truth]) -> str:
    """Markdown for one network: accuracy and KL of all arms, and our default against the best peer."""
    chosen = [r for r in rows if r["network"] == network and r["seed"] in seeds]
    cuts = sorted({r["cut"] for r in chosen})
    order = list(OURS)
    names = sorted(
        {r["arm"] for r in chosen}, key=lambda name: (order.index(name) if name in OURS else len(order), name)
    )
    at = {(name, cut): [r for r in chosen if r["arm"] == name and r["cut"] == cut] for name in names for cut in cuts}
    own = [truths[network, seed] for seed in seeds]
    dense = {s: float((t.logits.argmax(axis=1) == t.labels).mean()) for s, t in zip(seeds, own, strict=True)}
    head = ["| arm |" + "".join(f" -{100 * cut:g} % |" for cut in cuts), "| --- |" + " ---: |" * len(cuts)]

    def body(figure: str) -> str:
        return "\n".join(
            [*head, *(f"| {n} | {' | '.join(cell(at[n, c], dense, figure) for c in cuts)} |" for n in names)]
        )

    seen = f"## {network}, seeds {', '.join(map(str, seeds))}"
    return "\n\n".join([
        f"{seen}: dense {np.mean(list(dense.values())):.2%}, {own[0].macs:,} MACs",
        "Points of accuracy below the dense network, mean over the seeds (\\*: MACs off by more than a point):",
        body("accuracy"),
        "KL(dense || pruned), mean over images and seeds:",
        body("kl"),
        "Our default against the best peer of equal MACs, in points, 95 % interval over the images:",
        duel(at, cuts, dense, len(own[0].labels)),
    ])  # fmt: skip


def duel(
    at: Mapping[tuple[str, float], Sequence[Row]], cuts: Sequence[float], dense: Mapping[int, float], images: int
) -> str:
    """Markdown: for each cut the best peer that was measured on every seed, and our default against it."""
    lines = ["| MACs | best peer | below dense | ours better by | seconds of ours |", "| --- | --- |" + " ---: |" * 3]
    full = {key: found for key, found in at.items() if len(found) == len(dense) and all(map(compares, found))}
    for cut in cuts:
        peer_rows = {name: found for (name, c), found in full.items() if c == cut and name not in OURS}
        if not peer_rows:
            continue
        best = max(peer_rows, key=lambda name: float(np.mean([r["accuracy"] for r in peer_rows[name]])))
        text = "| |"
        if mine := full.get(("default", cut)):
            gap, low, high = difference(mine, peer_rows[best], images)
            text = f"{gap:+.2f} ({low:+.2f} to {high:+.2f}) | {np.mean([r['seconds'] for r in mine]):.0f} |"
        lines.append(f"| -{100 * cut:g} % | {best} | {cell(peer_rows[best], dense, 'accuracy')} | {text}")
    return "\n".join(lines)


# The run --------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[tuple[Any, ...], Row]:
    """{(network, seed, cut, arm): row}, the last line of each."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a run was killed while it wrote
            continue
        found[row["network"], row["seed"], row["cut"], row["arm"]] = row
    return found


def main() -> None:
    """Measure what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=seeds_of, default="3-5", help="0 to 2 tune, 3 to 5 report (3-5)")
    parser.add_argument("--cut", default=CUTS, help=f"shares of the MACs to remove ({CUTS})")
    parser.add_argument("--networks", default="cnn,vit")
    parser.add_argument("--arms", default="*", help="comma list of names or patterns (*)")
    parser.add_argument("--again", action="store_true", help="measure the arms anew")
    parser.add_argument("--rows", type=Path, help="the file of rows (FOLDER/rows.jsonl)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = given.rows or given.folder / "rows.jsonl"
    known = read_rows(store)
    calibration = np.load(given.folder / "calibration.npz")["image"]
    evaluation = np.load(given.folder / "evaluation.npz")
    networks = given.networks.split(",")
    truths = {}
    for network in networks:
        for seed in given.seeds:
            case = Case(given.folder, network, seed, calibration)
            logits = logits_of(onnx.load(case.dense), evaluation["image"])
            truths[network, seed] = Truth(evaluation["image"], evaluation["labels"], logits, count_macs(case.dense))
    fresh: dict[tuple[Any, ...], Row] = {}
    with store.open("a") as file:
        for cut in map(float, given.cut.split(",")):
            for (network, seed), truth in truths.items():
                case = Case(given.folder, network, seed, calibration)
                arms = {name: partial(ours, options) for name, options in OURS.items()} | peers.arms(network)
                for name, run in arms.items():
                    done = "missing" not in known.get((network, seed, cut, name), {"missing": ""})
                    if not any(fnmatch.fnmatch(name, p) for p in given.arms.split(",")) or (done and not given.again):
                        continue
                    print(network, seed, cut, name, file=sys.stderr)
                    for row in measured(name, run, case, truth, cut):
                        fresh[network, seed, cut, row["arm"]] = row
                        file.write(json.dumps(row) + "\n")
                    file.flush()
    rows = list((known | fresh).values())
    for network in networks:
        print(table(rows, network, given.seeds, truths), end="\n\n")


if __name__ == "__main__":
    main()
