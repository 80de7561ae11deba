"""Prune a model larger than memory, and say what that took.

python tools/benchmark_memory.py FOLDER [--size 3GB] [-- OPTIONS of prune, by default --target params=0.5]

Writes a decoder in fp16 with weights beside it, prunes it in a process of its own, and samples the anonymous memory of
that process and its children. For scale, `cp` and `sync` of the same files; the page cache is dropped before each where
this user may. What is in FOLDER afterwards is deleted, unless `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH, INNER, HEADS, WORDS = 4096, 11008, 32, 32000
ALIGN = 4096
ROWS = 512  # of a weight that are made at a time
NEAR = 0.3  # how far columns of which there are two lie apart, for repair to find something


class Writer:
    """A model whose weights go to a file of their own as they are made."""

    def __init__(self, path: Path) -> None:
        self.path, self.nodes, self.stored = path, [], []
        self.data = path.with_suffix(".data").open("wb")
        self.random = np.random.default_rng(0)
        self.block = self.random.standard_normal(1 << 25, np.float32).astype(np.float16)

    def noise(self, *shape: int) -> np.ndarray:
        """A stretch of one block of noise, from another place each time."""
        start = int(self.random.integers(len(self.block) - np.prod(shape)))
        return self.block[start : start + np.prod(shape)].reshape(shape)

    def weight(self, *shape: int, twice: bool = False) -> str:
        """A random initializer; with `twice` the second half of its columns is much like the first."""
        name, count = f"w{len(self.stored)}", int(np.prod(shape))
        start = self.data.seek(-self.data.tell() % ALIGN, os.SEEK_CUR)
        scale = np.float16(shape[0] ** -0.5)
        rows, columns = shape
        for first in range(0, rows, ROWS):
            some = min(ROWS, rows - first)
            part = self.noise(some, columns)
            if twice:
                half = columns // 2
                part = np.hstack([part[:, :half], part[:, :half] + part[:, half:] * np.float16(NEAR)])
            self.data.write((part * scale).data)
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT16, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.path.with_suffix(".data").name), ("offset", start), ("length", 2 * count)):
            tensor.external_data.add(key=key, value=str(value))
        self.stored.append(tensor)
        return name

    def constant(self, *values: float, kind: int = TensorProto.INT64) -> str:
        """A small initializer."""
        name = f"c{len(self.stored)}"
        self.stored.append(helper.make_tensor(name, kind, [len(values)], values))
        return name

    def add(self, op_type: str, *inputs: str, **attrs: object) -> str:
        """The output of a new node."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attrs))
        return name

    def norm(self, x: str) -> str:
        """Normalised over the width, with a gain."""
        ones = f"c{len(self.stored)}"
        gain = np.ones(WIDTH, np.float16).tobytes()
        tensor = TensorProto(name=ones, dims=[WIDTH], data_type=TensorProto.FLOAT16, raw_data=gain)
        self.stored.append(tensor)
        return self.add("LayerNormalization", x, ones, axis=-1)

    def heads(self, x: str, perm: list[int]) -> str:
        """[batch, length, width] -> heads apart."""
        apart = self.constant(0, 0, HEADS, WIDTH // HEADS)
        return self.add("Transpose", self.add("Reshape", x, apart), perm=perm)

    def block_of_layers(self, x: str) -> str:
        """Attention, then a gated FFN."""
        inside = self.norm(x)
        q, k, v = (self.add("MatMul", inside, self.weight(WIDTH, WIDTH, twice=True)) for _ in range(3))
        scores = self.add("MatMul", self.heads(q, [0, 2, 1, 3]), self.heads(k, [0, 2, 3, 1]))
        scale = self.constant((WIDTH // HEADS) ** -0.5, kind=TensorProto.FLOAT16)
        shares = self.add("Softmax", self.add("Mul", scores, scale), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", shares, self.heads(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        merged = self.add("Reshape", mixed, self.constant(0, 0, WIDTH))
        x = self.add("Add", x, self.add("MatMul", merged, self.weight(WIDTH, WIDTH)))
        inside = self.norm(x)
        gate, up = (self.add("MatMul", inside, self.weight(WIDTH, INNER, twice=True)) for _ in range(2))
        gated = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        return self.add("Add", x, self.add("MatMul", gated, self.weight(INNER, WIDTH)))

    def save(self, y: str) -> None:
        """Write the model."""
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
        logits = helper.make_tensor_value_info(y, TensorProto.FLOAT16, ["batch", "length", WORDS])
        graph = helper.make_graph(self.nodes, "decoder", [ids], [logits], self.stored)
        opsets = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), self.path)
        self.data.flush()
        os.fsync(self.data.fileno())
        self.data.close()


def decoder(path: Path, size: float) -> Path:
    """A decoder of about so many bytes."""
    layer, ends = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER), 4 * WORDS * WIDTH
    build = Writer(path)
    x = build.add("Gather", build.weight(WORDS, WIDTH), "ids")
    for _ in range(max(1, round((size - ends) / layer))):
        x = build.block_of_layers(x)
    build.save(build.add("MatMul", build.norm(x), build.weight(WIDTH, WORDS)))
    return path


def anonymous(process: int) -> list[int]:
    """Bytes of anonymous memory of a process and of each below it."""
    found, pending = [], [process]
    while pending:
        one = pending.pop(0)
        with suppress(OSError):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            found.append(sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")))
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
    return found


def forget() -> bool:
    """Write out and drop the page cache, if this user may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def watched(command: list[str]) -> tuple[float, list[int], str]:
    """(seconds, anonymous memory of each process when it was most, output) of a command."""
    start, most = time.perf_counter(), [0]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out) as process:
        while process.poll() is None:
            most = max(most, anonymous(process.pid), key=sum)
            time.sleep(0.05)
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - start, most, said


def number(text: str) -> float:
    """3GB, 500MB."""
    return float(text[:-2]) * {"GB": 1e9, "MB": 1e6}[text[-2:].upper()]


def main() -> None:
    """Make, copy, prune; one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="3GB")
    parser.add_argument("--keep", action="store_true")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:end])
    options = words[end + 1 :] or ["--target", "params=0.5"]
    given.folder.mkdir(exist_ok=True, parents=True)
    model = given.folder / "decoder.onnx"
    files = [model, model.with_suffix(".data")]
    try:
        if not model.exists():
            decoder(model, number(given.size))
        cold = forget()
        start = time.perf_counter()
        for file in files:
            subprocess.run(["cp", file, given.folder / f"{file.name}.copy"], check=True)
        subprocess.run(["sync"], check=True)
        copied = time.perf_counter() - start
        for file in files:
            (given.folder / f"{file.name}.copy").unlink()
        forget()
        prune = [sys.executable, "-m", "onnxprune", "prune", str(model), "-o", str(given.folder / "pruned.onnx"),
                 "--no-measure", "--json", *options]  # fmt: skip
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        seconds, most, said = watched(prune)
        report = json.loads(said)
        row = {
            "bytes": sum(file.stat().st_size for file in files),
            "pruned bytes": sum(file.stat().st_size for file in given.folder.glob("pruned.onnx*")),
            "anonymous bytes": sum(most),
            "of which in each process": most,
            "CPU seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before, 1),
            "seconds": round(seconds, 1),
            "cp and sync, seconds": round(copied, 1),
            "cold": cold,
            "proven": report["verification"]["proven"],
            "timing": report["timing"],
        }
        print(json.dumps(row))
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
