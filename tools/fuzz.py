"""Look for what breaks: python tools/fuzz.py TARGET [--runs N] [--seconds S] [--keep FOLDER].

`mutations` spoils models of tests/zoo.py and prunes them; the other targets are led by coverage (pip install atheris):
`load` reads and analyses a file, `external` a model with data elsewhere, `recipe` and `calibration` read such files.
Whatever is neither success nor an error of ours with code 2, 3 or 4 is a finding: it is printed, its file is kept, and
it belongs into a table of the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 60  # models that the targets led by coverage start from
LIMITS = ("-timeout=20", "-rss_limit_mb=3000", "-max_len=20000")


def mutations(runs: int, seconds: float, keep: Path) -> int:
    """Prune spoiled models; the number of findings."""
    from test_mutations import drawn, pruned

    end, findings = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(runs):
            if time.monotonic() > end:
                break
            if why := pruned(seed, Path(folder)):
                findings += 1
                name, changes, content = drawn(seed)
                (keep / f"mutation-{seed}.onnx").write_bytes(content)
                print(f"{seed}: {name}: {', '.join(changes)}: {why}", flush=True)
    return findings


def load(path: Path, data: bytes) -> None:
    """Read and analyse."""
    from onnxprune.analysis import Analysis

    path.with_suffix(".onnx").write_bytes(data)
    Analysis(path.with_suffix(".onnx"))


def external(path: Path, data: bytes) -> None:
    """Read a model of which one tensor says that it lies elsewhere: key NUL value NUL ..."""
    import onnx

    from onnxprune.reading import read_model

    texts = data.decode(errors="replace").split("\0")
    tensor = onnx.TensorProto(name="w", dims=[2, 2], data_type=1, data_location=1)
    for key, value in zip(texts[::2], texts[1::2], strict=False):
        tensor.external_data.add(key=key, value=value)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", "xw", "y")], "g", ends[:1], ends[1:], [tensor])
    (path.parent / "w.bin").write_bytes(bytes(64))
    path.with_suffix(".onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    read_model(path.with_suffix(".onnx"))


def recipe(path: Path, data: bytes) -> None:
    """Read a recipe and look for contradictions in it."""
    from onnxprune.recipe import Options, check, read

    check(Options(**read(data, "recipe.yaml")))


def calibration(path: Path, data: bytes) -> None:
    """Read arrays."""
    from onnxprune.storage import read_arrays

    file = path.with_suffix(".npz" if data[:2] == b"PK" else ".npy")
    file.write_bytes(data)
    read_arrays(file)


def corpus(target: str, folder: Path) -> None:
    """Files to start from."""
    import numpy as np
    from zoo import ZOO

    folder.mkdir()
    if target == "load":
        models = sorted((make().SerializeToString() for make in ZOO.values()), key=len)[:SEEDS]
        for k, content in enumerate(models):
            (folder / f"{k}.onnx").write_bytes(content)
    elif target == "external":
        for k, text in enumerate(
            ("location\0w.bin\0offset\x004\0length\x0016", "location\0../w.bin", "location\0/dev/zero")
        ):
            (folder / str(k)).write_text(text)
    elif target == "recipe":
        (folder / "0").write_text("ratio: 0.5\nremove: [channels, heads]\ntarget: {macs: 0.5}\nignore: ['*']\n")
    else:
        np.savez(folder / "0.npz", x=np.zeros((2, 3), np.float32), y=np.arange(4))
        np.save(folder / "1.npy", np.zeros((3, 1)))


def led(target: str, runs: int, seconds: float, keep: Path) -> None:
    """Run one target under atheris, which ends this process."""
    import atheris

    with atheris.instrument_imports(include=["onnxprune"]):
        import onnxprune.analysis
        import onnxprune.recipe
        import onnxprune.storage  # noqa: F401
    from onnxprune.errors import PruneError

    here = Path(tempfile.mkdtemp(prefix="onnxprune-fuzz-"))
    corpus(target, here / "corpus")
    one: Callable[[Path, bytes], None] = TARGETS[target]

    def try_one(data: bytes) -> None:
        try:
            one(here / "file", data)
        except PruneError as error:
            if error.code not in (2, 3, 4) or not str(error).isprintable() or len(str(error)) > 600:
                raise

    limits = [*LIMITS, f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-artifact_prefix={keep}/{target}-"]
    atheris.Setup([sys.argv[0], *limits, str(here / "corpus")], try_one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(here, ignore_errors=True)


TARGETS = {"load": load, "external": external, "recipe": recipe, "calibration": calibration}


def main() -> None:
    """Parse, run, exit with 1 after findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["mutations", *TARGETS])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--keep", type=Path, default=Path("findings"))
    given = parser.parse_args()
    given.keep.mkdir(exist_ok=True, parents=True)
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if given.target == "mutations":
        sys.exit(bool(mutations(given.runs, given.seconds, given.keep)))
    led(given.target, given.runs, given.seconds, given.keep)


if __name__ == "__main__":
    main()
