"""ONNX Runtime, on the CPU and through CUDA. Everything here runs in the child process of worker.py."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.errors import InputError, MachineError, PruneError, UnloadableError
from onnxprune.interface import narrow, noted
from onnxprune.types import Array, Signature

if TYPE_CHECKING:
    import onnxruntime

BFLOAT16 = 16  # TensorProto.BFLOAT16
UNREAD = ("float8", "float4", "int4", "int2", "complex")  # element types that NumPy has no arrays of
NOISE = (
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : ",
    r"(Exception during (loading|initialization): |Load model from .*? failed: ?)",
    r"(?<!\S)\S{1,300}\.(cc|cpp|cu|h):\d+ ([^()]*\([^()]*\)( const)?|\w+) ",  # where in its sources
)
NODE = re.compile(r"Non-zero status code returned while running \S+ node\. Name:'(.*?)' Status Message: ")
SHORT = re.compile(r"bad_alloc|bad allocation|Failed to allocate memory|out of memory|CUDA failure 2\b")


@dataclass(frozen=True)
class Port:
    """An input or output: name, type as ONNX Runtime spells it, `tensor(float)`, and dims, names for dynamic ones."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Interface:
    """What a model takes and gives."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """ONNX Runtime's exceptions as ours: InputError with its reason and the node, MachineError without memory."""
    try:
        yield
    except (MemoryError, PruneError):
        raise
    except Exception as error:
        text = str(error)
        if SHORT.search(text):
            raise MachineError(f"out of memory: ONNX Runtime cannot {doing} the model") from None
        for pattern in NOISE:
            text = re.sub(pattern, "", text)
        node = NODE.search(text)
        # What remains may start with the source line that the node's part hid.
        line = re.sub(NOISE[-1], "", NODE.sub("", text)).strip().split("\n")[0].strip()
        if not line.isprintable():
            line = line.encode("unicode_escape").decode("ascii")
        line = line if len(line) <= 300 else line[:297] + "..."
        culprit = f"node '{node[1]}'" if node and node[1] else ""
        kind = UnloadableError if doing == "load" else InputError
        raise kind(f"ONNX Runtime cannot {doing} the model: {line}", object=culprit) from None


@dataclass(frozen=True)
class OrtSession:
    """A loaded model."""

    made: onnxruntime.InferenceSession
    device: str
    interface: Interface

    def run(
        self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None, shrink: bool = False
    ) -> dict[str, Array]:
        """{output: array}; a sequence or map as one entry for each element, `name[0]`, an absent optional as none.

        With `shrink` the arena of the session returns what it does not need any more.
        bfloat16 comes back as float32, which holds it exactly. Raises InputError with ONNX Runtime's reason.
        """
        wanted = [port for port in self.interface.outputs if outputs is None or port.name in outputs]
        names = [port.name for port in wanted]
        if missing := sorted(set(outputs or ()) - set(names)):
            raise InputError("the model has no such output", object=missing[0])
        for port in wanted:
            if any(kind in port.type for kind in UNREAD):
                raise InputError(f"outputs of type {port.type} cannot be read", object=port.name)
        found: dict[str, Array] = {}
        for name, value in zip(names, self._step(feed, names, shrink)(), strict=True):
            found.update(_flat(name, value))
        return found

    def bound(self, feed: Mapping[str, Array]) -> Callable[[], object]:
        """One run on inputs that lie where the device reads them; outputs stay there."""
        if self.device == "cpu":
            return self._step(feed, [port.name for port in self.interface.outputs])
        import onnxruntime

        with translated("run"):
            binding = self.made.io_binding()
            for name, array in self._checked(feed).items():
                on_host = _value(array)
                if array.dtype.name == "bfloat16":
                    binding.bind_ortvalue_input(name, on_host)
                else:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)
                    binding.bind_ortvalue_input(name, value)

        def step() -> None:
            for port in self.interface.outputs:  # anew, so that sizes which depend on data may change
                binding.bind_output(port.name, self.device)
            self.made.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return _guarded(step)

    def _step(self, feed: Mapping[str, Array], names: list[str], shrink: bool = False) -> Callable[[], Any]:
        """A run that answers values of these outputs: arrays, OrtValues where bfloat16 takes part."""
        arrays, options = self._checked(feed), None
        if shrink:
            import onnxruntime

            options = onnxruntime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        ports = (*self.interface.inputs, *self.interface.outputs)
        if not any("bfloat16" in port.type for port in ports):
            return _guarded(lambda: self.made.run(names, arrays, options))
        with translated("run"):
            values = {name: _value(array) for name, array in arrays.items()}
        return _guarded(lambda: self.made.run_with_ort_values(names, values, options))

    def _checked(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        for port in self.interface.inputs:
            if port.name not in feed:
                raise InputError("there is no value for this input", object=port.name)
        given = {port.name: feed[port.name] for port in self.interface.inputs}
        return narrow(given, noted(self.made.get_modelmeta().custom_metadata_map))


def _guarded(step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with translated("run"):
            return step()

    return run


def _value(array: Array) -> onnxruntime.OrtValue:
    import onnxruntime

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """Arrays of one output."""
    if value is None:
        return
    if isinstance(value, list | dict):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}[{key}]", part)
    elif hasattr(value, "data_type"):
        yield name, _widened(value) if value.data_type() == "tensor(bfloat16)" else value.numpy()
    else:
        yield name, np.asarray(value)


def _widened(value: onnxruntime.OrtValue) -> Array:
    """float32 of bfloat16, which is its upper half; NumPy cannot be handed the memory itself."""
    import ctypes

    count = value.tensor_size_in_bytes()
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), count) if count else b"", np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(value.shape())


@dataclass(frozen=True)
class OrtBackend:
    """ONNX Runtime with one execution provider."""

    name: str
    provider: str

    def available(self) -> str | None:
        """None, or why not and what to install."""
        if reason := conflict(self.name):
            return reason
        with _imported() as onnxruntime:
            offered = self.provider in onnxruntime.get_available_providers()
        return None if offered else "this onnxruntime has no CUDA; pip uninstall it, then pip install 'onnxprune[gpu]'"

    def session(
        self,
        model: str | bytes,
        *,
        threads: int = 1,
        optimise: bool = True,
        arena: bool = True,
        shared: bool = False,
        exact: bool = False,
    ) -> OrtSession:
        """Load the model at a path, or from its bytes; without `arena`, memory is returned after use instead of kept.

        Sessions that are `shared` take it from one arena of the process, and their threads sleep while they have
        nothing to do: for large pieces that run one after the other. `exact` takes kernels for eight bits that do not
        saturate, which are slower on processors without VNNI.

        Raises InputError if the model cannot be loaded, MachineError if the provider does not start.
        """
        with _imported() as onnxruntime:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.use_deterministic_compute = True
            options.log_severity_level = 4
            options.enable_cpu_mem_arena = arena
            if shared:
                with _sharing:
                    _shared()
                options.enable_mem_pattern = False
                options.add_session_config_entry("session.use_env_allocators", "1")
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if exact:
                options.add_session_config_entry("session.x64quantprecision", "1")
            if not optimise:
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            with _spelled(model) as readable, translated("load"):
                made = onnxruntime.InferenceSession(readable, options, providers=[self.provider])
        if self.provider not in made.get_providers():  # ONNX Runtime falls back to the CPU with a mere warning
            raise MachineError("CUDA did not start; are driver, CUDA and cuDNN there?", object=f"backend {self.name}")
        return OrtSession(made, self.name, Interface(_ports(made.get_inputs()), _ports(made.get_outputs())))


REGION = 1 << 30  # bytes that the shared arena asks for at first; pages that nobody writes to take no memory


_sharing = threading.Lock()


@cache
def _shared() -> None:
    """Make the arena, once in a process."""
    import onnxruntime as ort

    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    exact = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": REGION}
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(exact | {"max_dead_bytes_per_chunk": 1 << 20}))


def sharing() -> bool:
    """Whether there is an arena that sessions share."""
    return _shared.cache_info().currsize > 0


@contextmanager
def _spelled(model: str | bytes) -> Iterator[str | bytes]:
    """A path in UTF-8, which is all that ONNX Runtime takes: through a link to its folder, if need be."""
    if isinstance(model, bytes) or not any("\udc80" <= c <= "\udcff" for c in model):
        yield model
        return
    folder, name = os.path.split(os.path.abspath(model))
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as here:
        os.symlink(folder, f"{here}/folder")
        yield f"{here}/folder/{name}"


BACKENDS = {
    "cpu": OrtBackend("cpu", "CPUExecutionProvider"),
    "cuda": OrtBackend("cuda", "CUDAExecutionProvider"),
}


def conflict(backend: str) -> str | None:
    """What is wrong with the packages that bring ONNX Runtime, and the fix.

    onnxruntime and onnxruntime-gpu install the same files, and pip says nothing. Two of one version still work on
    the CPU, so that is not refused.
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    found = {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if len(found) == 2 and (backend != "cpu" or len(set(found.values())) == 2):
        extra = "cpu" if backend == "cpu" else "gpu"
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"pip uninstall both, then pip install 'onnxprune[{extra}]'"
        )
    if not found and find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed; pip install 'onnxprune[{'cpu' if backend == 'cpu' else 'gpu'}]'"
    return None


@contextmanager
def _imported() -> Iterator[Any]:
    """The package, silent. Raises MachineError if it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(conflict("cpu") or f"ONNX Runtime cannot be imported: {error}") from None
    onnxruntime.set_default_logger_severity(4)
    yield onnxruntime


def _ports(given: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(port.name, port.type, tuple(port.shape)) for port in given)


def run(
    model: str,
    feeds: Sequence[Mapping[str, Array]],
    outputs: Sequence[str] | None = None,
    threads: int = 1,
    optimise: bool = True,
) -> list[dict[str, Array]]:
    """{output: array} for each feed, on the CPU; as the model is written with `optimise` False.

    Sums of eight-bit products do not saturate where ONNX Runtime can help it: which of them saturate together changes
    when positions go.
    """
    load = partial(BACKENDS["cpu"].session, model, threads=threads, optimise=optimise, arena=False)
    try:
        made = load(exact=True)
    except InputError:  # not every quantised operator exists in that form
        made = load()
    return [made.run(feed, outputs) for feed in feeds]


def interface(path: str) -> Interface:
    """Inputs and outputs as ONNX Runtime sees them: proof that the file loads."""
    return BACKENDS["cpu"].session(path, arena=False).interface


def convert(model: str, target: str) -> None:
    """Write an ONNX model in ORT format, optimised as far as holds on every processor."""
    with _imported() as onnxruntime:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = target
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.save_model_format", "ORT")
        with translated("convert"):
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def signatures(wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], Signature]:
    """{(domain, operator): its types} of operators that ONNX Runtime adds to ONNX; as far as it tells."""
    if not wanted:
        return {}
    with _imported():
        try:
            from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
        except ImportError:
            return {}
        return {
            (schema.domain, schema.name): Signature(
                tuple(port.typeStr for port in schema.inputs),
                tuple(port.typeStr for port in schema.outputs),
                {var.type_param_str: frozenset(var.allowed_type_strs) for var in schema.type_constraints},
            )
            for schema in get_all_operator_schema()
            if (schema.domain, schema.name) in wanted
        }


LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantise(model: str, target: str, feeds: Sequence[Mapping[str, Array]], opset: int) -> None:
    """Write a copy with Q and DQ around the inputs of linear operators: int8, symmetric, as TensorRT takes them.

    Weights have a scale for each channel where the operator set knows of it (13). Scales come from the feeds.
    """
    with _imported():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Feeds(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = iter(feeds)

            def get_next(self) -> Mapping[str, Array] | None:
                return next(self.left, None)

        with translated("quantise"):
            quantize_static(
                model,
                target,
                Feeds(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(LINEAR),
                per_channel=opset >= 13,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=False,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": list(LINEAR),
                },
            )
