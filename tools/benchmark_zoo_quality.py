"""What pruning costs trained models by their own metrics: python tools/benchmark_zoo_quality.py FOLDER [MODEL...].

The models, their data and evaluate.py are in the folder that ONNXPRUNE_ZOO names. Half of the data calibrates, the
other half measures. FOLDER receives the feeds made from the first half (`MODEL.npz`, or a folder of feeds where the
state of a recurrent model has its batch elsewhere than on axis 0), the pruned models, and rows.json, which a killed
run takes up again. Prints Markdown, progress on stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import onnxprune

Arrays = Mapping[str, NDArray]
SENTENCES = 1024


# The two parts of the data --------------------------------------------------------------------------------------------


def parts(name: str, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(for calibration, for evaluation): every second sample each, unless the data has a split of its own.

    Running text is cut in the middle, since neighbours belong to one story.
    """
    if name == "minilm":
        return arrays, arrays  # the dev split and the test split have names of their own
    if name == "stories260k":
        half = len(arrays["input_ids"]) // 2
        return {"input_ids": arrays["input_ids"][:half]}, {"input_ids": arrays["input_ids"][half:]}
    sampled = {key for key in arrays if key != "charset"}
    first, second = ({k: a[start::2] if k in sampled else a for k, a in arrays.items()} for start in (0, 1))
    return first, second


# Feeds, as zoo.json describes them ------------------------------------------------------------------------------------


def images(name: str, key: str, shift: float = 0.0, scale: float = 1.0) -> Callable[[Arrays], Arrays]:
    """One float32 input, (stored - shift) / scale."""
    return lambda arrays: {name: (arrays[key].astype(np.float32) - np.float32(shift)) / np.float32(scale)}


def lines(arrays: Arrays) -> Arrays:
    """Text lines of ppocr_en_rec: grey repeated on three channels, zeros to the right of each line."""
    inside = np.arange(arrays["gray"].shape[2]) < arrays["width"][:, None, None]
    scaled = np.where(inside, (arrays["gray"].astype(np.float32) / 255 - 0.5) / 0.5, 0).astype(np.float32)
    return {"x": np.repeat(scaled[:, None], 3, axis=1)}


def sentences(arrays: Arrays) -> Arrays:
    """Sentences of the dev pairs of minilm, evenly spaced: the pairs are sorted by genre, captions first."""
    ids, mask = (np.stack([arrays[f"dev_{k}1"], arrays[f"dev_{k}2"]], axis=1) for k in ("ids", "mask"))
    whole = [a.reshape(-1, a.shape[-1]) for a in (ids, mask)]
    taken = np.linspace(0, len(whole[0]) - 1, SENTENCES).round().astype(int)
    flat = [a[taken].astype(np.int64) for a in whole]
    return dict(zip(("input_ids", "attention_mask"), flat, strict=True))


def tokens(arrays: Arrays) -> Arrays:
    """Sequences of stories260k, with nothing in the cache."""
    ids = arrays["input_ids"].astype(np.int64)
    empty = np.zeros((len(ids), 4, 0, 8), np.float32)
    cache = {f"past_key_values.{k}.{part}": empty for k in range(5) for part in ("key", "value")}
    return {"input_ids": ids, **cache}


def speech(model: Path, arrays: Arrays) -> Iterator[Arrays]:
    """Steps of silero_vad, every tenth, with the state that the dense model has reached."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    pcm = arrays["pcm"].astype(np.float32) / 32768
    padded = np.pad(pcm, ((0, 0), (64, 0)))
    state = np.zeros((2, len(pcm), 128), np.float32)
    for step in range(pcm.shape[1] // 512):
        feed = {"input": padded[:, step * 512 : step * 512 + 576], "state": state, "sr": np.array(16000, np.int64)}
        if step % 10 == 9:
            yield feed
        state = session.run(None, feed)[1]


def spectra(model: Path, arrays: Arrays) -> Iterator[Arrays]:
    """Frames of gtcrn, every eighth, with the caches that the dense model has reached."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    window = np.hanning(513)[:512] ** 0.5
    caches = {"conv_cache": (2, 1, 16, 16, 33), "tra_cache": (2, 3, 1, 1, 16), "inter_cache": (2, 1, 33, 16)}
    for clip in arrays["noisy"].astype(np.float32) / 32768:
        held = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}
        for step, start in enumerate(range(0, len(clip) - 511, 256)):
            spectrum = np.fft.rfft(clip[start : start + 512] * window)
            mix = np.stack([spectrum.real, spectrum.imag], axis=-1)[None, :, None].astype(np.float32)
            feed = {"mix": mix, **held}
            if step % 8 == 7:
                yield feed
            held = dict(zip(caches, session.run(None, feed)[1:], strict=True))


STACKED: Mapping[str, Callable[[Arrays], Arrays]] = {
    "basic_pitch": lambda arrays: {"serving_default_input_2:0": arrays["pcm"][..., None].astype(np.float32) / 32768},
    "cifar10_tiniest": images("input", "images", scale=255),
    "fastestdet": images("input.1", "images", scale=255),
    "magika_v3_3": lambda arrays: {"bytes": arrays["bytes"].astype(np.int32)},
    "minilm": sentences,
    "nnsplit_en": lambda arrays: {"input": arrays["input"]},
    "ppocr_en_rec": lines,
    "stories260k": tokens,
    "superres_espcn": images("input", "input", scale=255),
    "tbefn_unet": images("Placeholder", "input", scale=255),
    "ultraface_rfb320": images("input", "input", shift=127, scale=128),
    "yolox_nano": images("images", "images"),
}
STEPPED: Mapping[str, Callable[[Path, Arrays], Iterator[Arrays]]] = {"gtcrn": spectra, "silero_vad": speech}


def write_feeds(name: str, model: Path, arrays: Arrays, folder: Path) -> Path:
    """The feeds of one model as --calibration takes them; made once."""
    if name in STACKED:
        path = folder / f"{name}.npz"
        if not path.exists():
            np.savez(path, **STACKED[name](arrays))
        return path
    path = folder / name
    if not path.exists():
        path.mkdir()
        for k, feed in enumerate(STEPPED[name](model, arrays)):
            np.savez(path / f"{k:04}.npz", **feed)
    return path


# Measures -------------------------------------------------------------------------------------------------------------


def load_evaluate(zoo: Path) -> ModuleType:
    """The module evaluate.py of the zoo: one function for each model."""
    spec = importlib.util.spec_from_file_location("evaluate", zoo / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def embeddings(model: Path, arrays: Arrays) -> NDArray:
    """float64[sentences, width]: the test sentences of minilm by length, each of unit length."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    parts = {"input_ids": ("test_ids1", "test_ids2"), "attention_mask": ("test_mask1", "test_mask2")}
    whole = {k: np.concatenate([arrays[p] for p in pair]).astype(np.int64) for k, pair in parts.items()}
    lengths = whole["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    batches = [order[start : start + 64] for start in range(0, len(order), 64)]  # padding costs time and says nothing
    found = [session.run(None, {k: a[rows, : lengths[rows].max()] for k, a in whole.items()})[0] for rows in batches]
    return np.concatenate(found).astype(np.float64)


def measured(name: str, model: Path, dense: Path, arrays: Arrays, evaluate: ModuleType) -> dict[str, float]:
    """All figures of a model; for embeddings also the mean of 1 - cosine to the dense ones."""
    found: dict[str, float] = getattr(evaluate, name)([str(model)], arrays, [str(dense)])
    if name == "minilm":
        cosines = (embeddings(model, arrays) * embeddings(dense, arrays)).sum(axis=1)
        found["cosine_distance"] = float(np.mean(1 - cosines))
    return found


# The run --------------------------------------------------------------------------------------------------------------


def row(model: Path, share: float, calibration: Path, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """One model pruned to a share of its MACs: costs and seconds, or the reason why not."""
    out = folder / f"{model.parent.name}_{model.stem}_{share}.onnx"
    started = time.perf_counter()
    try:
        report = onnxprune.prune(
            model,
            out,
            target={"macs": share},
            calibration=str(calibration),
            measure=False,
            force=True,
            no_cache=True,
            **options,
        ).report
    except onnxprune.PruneError as error:
        return {"refused": f"exit {error.code}: {error.message}"}
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "macs": report.pruned.macs / report.dense.macs,
        "params": report.pruned.params / report.dense.params,
        "pruned": str(out),
    }


def table(rows: list[dict[str, Any]], metrics: Mapping[str, str]) -> str:
    """Markdown, the own metric of each model dense and pruned."""
    text = ["| model | metric | dense | asked | MACs | params | pruned | seconds |", "| --- | --- |" + " ---: |" * 6]
    for r in rows:
        for metric in (metrics[r["name"]], "cosine_distance"):
            if metric not in r["dense"]:
                continue
            head = f"| {r['name']}/{r['model']} | {metric} | {r['dense'][metric]:.4f} | {r['share']} |"
            if "refused" in r:
                text.append(f"{head} {r['refused']} |" + " |" * 3)
            else:
                values = f"{r['macs']:.3f} | {r['params']:.3f} | {r['found'][metric]:.4f} | {r['seconds']:.0f}"
                text.append(f"{head} {values} |")
    return "\n".join(text)


def main() -> None:
    """Fill rows.json; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="folders of the zoo (all)")
    parser.add_argument("--shares", default="0.7,0.5", help="of the MACs that may stay (0.7,0.5)")
    parser.add_argument("--everything", action="store_true", help="as --remove all --approximate")
    parser.add_argument("--caches", action="store_true", help="with --allow-interface-change")
    parser.add_argument("--feeds", action="store_true", help="only write the calibration feeds")
    given = parser.parse_args()
    zoo = Path(os.environ.get("ONNXPRUNE_ZOO") or sys.exit("set ONNXPRUNE_ZOO to the folder of models"))
    evaluate = load_evaluate(zoo)
    entries = {entry["name"]: entry for entry in json.loads((zoo / "zoo.json").read_text())["models"]}
    options: dict[str, Any] = {"remove": ("all",), "approximate": True} if given.everything else {}
    options |= {"allow_interface_change": True} if given.caches else {}
    given.folder.mkdir(parents=True, exist_ok=True)
    suffix = "_everything" * given.everything + "_caches" * given.caches
    store = given.folder / f"rows{suffix}.json"
    rows: list[dict[str, Any]] = json.loads(store.read_text()) if store.exists() else []
    for name in given.models or entries:
        arrays = dict(np.load(zoo / entries[name]["eval"][0]["file"]))
        first, second = parts(name, arrays)
        for model in sorted((zoo / name).glob("*.onnx")):
            calibration = write_feeds(name, model, first, given.folder)
            if given.feeds:
                continue
            for share in map(float, given.shares.split(",")):
                key = {"name": name, "model": model.stem, "share": share}
                if any(key.items() <= r.items() and "found" in r for r in rows):
                    continue
                rows = [r for r in rows if not key.items() <= r.items()]
                print(*key.values(), file=sys.stderr)
                found = row(model, share, calibration, given.folder, options)
                known = [r["dense"] for r in rows if (r["name"], r["model"]) == (name, model.stem) and "dense" in r]
                found["dense"] = known[0] if known else measured(name, model, model, second, evaluate)
                if "pruned" in found:
                    found["found"] = measured(name, Path(found["pruned"]), model, second, evaluate)
                rows.append(key | found)
                store.write_text(json.dumps(rows, indent=1))
    print(table(rows, {name: entry["metric"]["name"] for name, entry in entries.items()}))


if __name__ == "__main__":
    main()
