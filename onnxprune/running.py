"""Models run in a child process: whole, or piece by piece where the whole would take more memory than it may."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune import bfloat
from onnxprune.errors import InputError
from onnxprune.flow import Flow, Room, Sessions
from onnxprune.reading import deserialized, serialized
from onnxprune.runtime import ort
from onnxprune.storage import dump
from onnxprune.types import Array
from onnxprune.weights import attach, lifted
from onnxprune.worker import Worker, tell

Feeds = Sequence[Mapping[str, Array]]
HALVES = ("FLOAT16", "BFLOAT16")  # of which ONNX Runtime makes single precision on a CPU
MEMORY = 3 * 10**9  # bytes of weights above which a model is not loaded as a whole
PIECE = 1 << 27  # bytes of weights in a piece, at most a quarter of the memory: one is cast while it is used
FEW = 4  # feeds that a piece computes at once
BESIDE = 1 << 28  # bytes from which weights are streamed to a file beside the model
SMALL = 1024  # bytes up to which a weight travels with the graph


def memory_of(model: ir.Model) -> int:
    """Bytes that weights take in ONNX Runtime when the model runs as a whole: it packs most of them once more."""
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return sum(2 * t.nbytes * (2 if t.dtype.name in HALVES else 1) for t in held if t.dtype != ir.DataType.STRING)


@dataclass(frozen=True)
class Runner:
    """Runs models in one child, within so many bytes as far as weights are concerned.

    Nothing is timed here, and reading weights takes longest: what goes piece by piece takes all cores.
    """

    worker: Worker
    threads: int
    memory: int
    pieces: bool = False  # whatever the model's size

    def fits(self, model: ir.Model) -> bool:
        """Whether a model may be loaded as a whole."""
        return not self.pieces and memory_of(model) <= self.memory

    def __call__(self, model: ir.Model, feeds: Feeds) -> list[dict[str, Array]]:
        """Outputs for each feed. Raises what Worker.call raises."""
        with self.ready(model) as run:
            return run(feeds)

    @contextmanager
    def ready(self, model: ir.Model) -> Iterator[Callable[[Feeds], list[dict[str, Array]]]]:
        """What computes a model's outputs for each feed, any number of times."""
        if self.fits(model):
            with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
                made = bfloat.single(model)
                path = str(dump(made, folder, "model", external=memory_of(model) > BESIDE))
                yield lambda feeds: self.worker.call(
                    ort.run, path, list(feeds) if made is model else list(map(bfloat.fed, feeds)), threads=self.threads
                )
            return
        yield lambda feeds: self.together([model], feeds)[0]

    def together(self, models: Sequence[ir.Model], feeds: Feeds) -> list[list[dict[str, Array]]]:
        """Outputs of several models for each feed; those that go piece by piece do so side by side."""
        if any(map(self.fits, models)):
            return [self(model, feeds) for model in models]
        threads, sent = max(self.threads, len(os.sched_getaffinity(0))), [packed(model) for model in models]
        found: list[list[dict[str, Array]]] = self.worker.call(in_pieces, sent, list(feeds), threads, self.memory)
        return found


Packed = tuple[bytes, Mapping[str, ir.TensorProtocol]]


def packed(model: ir.Model) -> Packed:
    """A model as it travels to the child: weights that lie in a file stay there."""
    skeleton, tensors = lifted(model, SMALL)
    return serialized(skeleton).SerializeToString(), tensors


def unpacked(sent: Packed) -> ir.Model:
    """In the child: the model again."""
    message, tensors = sent
    model = deserialized(onnx.ModelProto.FromString(message))
    attach(model, tensors)
    return model


def limits(share: int) -> dict[str, int]:
    """What a Flow takes of a model's weights at a time, where it has so many bytes for them."""
    return {"most": min(PIECE, share), "most_feeds": FEW}


def in_pieces(sent: Sequence[Packed], feeds: Feeds, threads: int, memory: int) -> list[list[dict[str, Array]]]:
    """In the child: outputs of each model for each feed, with the weights of a few nodes of each at a time.

    Models share cores and memory. Two of them keep two cores busier than one does, of which single operators wait.
    """
    models = [unpacked(one) for one in sent]
    names = [[str(value.name) for value in model.graph.outputs] for model in models]
    each, share = max(1, threads // len(models)), memory // 4 // len(models)
    done, telling, failed = [0] * len(models), threading.Lock(), threading.Event()

    def told(k: int, reached: int, total: int) -> None:
        if failed.is_set():
            raise CancelledError
        with telling:  # so that it never goes back
            done[k] = reached
            tell("run it in pieces", sum(done), due)

    for model in models:
        inputs = [str(value.name) for value in model.graph.inputs if value.name not in model.graph.initializers]
        if missing := [name for feed in feeds for name in inputs if name not in feed]:
            raise InputError("there is no value for this input", object=missing[0])
    flows = [
        Flow(
            model,
            feeds,
            Sessions(each, 1, shared=True),
            outputs,
            room=Room(share),
            told=partial(told, k),
            **limits(share),
        )
        for k, (model, outputs) in enumerate(zip(models, names, strict=True))
    ]
    due = sum(flow.due(outputs) for flow, outputs in zip(flows, names, strict=True))

    def run(k: int) -> list[dict[str, Array]]:
        return [dict(zip(names[k], row, strict=True)) for row in zip(*flows[k].values(names[k]), strict=True)]

    with ThreadPoolExecutor(len(models)) as pool:
        runs = [pool.submit(run, k) for k in range(len(models))]
        first = min(wait(runs, return_when=FIRST_EXCEPTION).done, key=lambda one: one.exception() is None)
        if first.exception() is not None:
            failed.set()  # the others need not go on
            first.result()
        return [one.result() for one in runs]


def give_back() -> None:
    """In the child: return the memory that pieces have kept."""
    if ort.sharing():
        graph = onnx.parser.parse_graph("nothing (float[1] x) => (float[1] y) { y = Neg (x) }")
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13)])
        session = ort.BACKENDS["cpu"].session(model.SerializeToString(), shared=True)
        session.run({"x": np.zeros(1, np.float32)}, shrink=True)
    trim()


def trim() -> None:
    """Return memory that was freed, between what is in use as well."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
