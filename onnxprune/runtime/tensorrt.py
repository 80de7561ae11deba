"""TensorRT 10 and 11, and TensorRT-RTX: one API under two names. Everything here runs in the child of worker.py.

Networks are strongly typed wherever that can be asked for: precision is what the graph says. An engine is native code:
the caller makes sure that one from a file was built in this run, or that the user trusts it.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import ImpossibleError, InputError, MachineError
from onnxprune.types import Array, Profile

NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
INLINE = 1_900_000_000  # bytes of a model above which its weights go to a file of their own
ENGINES = (".engine", ".plan")


@dataclass(frozen=True)
class Built:
    """What is known about an engine: the library's version, inputs and outputs, layers, the timing cache after it.

    Inputs and outputs are {name: [type, shape]}. `layers` is what the inspector says, None without a GPU, where an
    engine cannot be loaded.
    """

    version: str
    inputs: dict[str, tuple[str, list[int]]]
    outputs: dict[str, tuple[str, list[int]]]
    sparse: bool
    layers: Any
    cache: bytes


def library(name: str) -> Any:
    """The Python package of a backend. Raises MachineError with what to install."""
    try:
        if name == "tensorrt":
            import tensorrt

            return tensorrt
        import tensorrt_rtx

        return tensorrt_rtx
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("tensorrt")
        why = "is not installed" if missing else f"cannot be imported: {str(error).splitlines()[0]}"
        raise MachineError(f"{NAMES[name]} {why}; pip install 'onnxprune[{name}]'", object=f"backend {name}") from None


def gpu() -> str | None:
    """None, or why no NVIDIA GPU can be used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1): it needs an NVIDIA GPU"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "there is no NVIDIA GPU"
    return None


def logger(trt: Any) -> Any:
    """A logger that says nothing and remembers errors."""

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)

        def reason(self) -> str:
            """The first error: later ones follow from it."""
            return self.errors[0] if self.errors else "it does not say why"

    return Quiet()


# Building ------------------------------------------------------------------------------------------------------------


def ready(model: str, target: str) -> None:
    """Write the copy that the parser reads: constants folded, sorted, nothing left that no output needs.

    What graphsurgeon cannot hold (four-bit weights, say) is parsed as it is.
    """
    import onnx
    import onnx_graphsurgeon

    loaded = onnx.load(model)
    try:
        graph = onnx_graphsurgeon.import_onnx(loaded)
        graph.fold_constants(error_ok=True).cleanup().toposort()
        loaded = onnx_graphsurgeon.export_onnx(graph)
    except Exception:
        loaded = onnx.load(model)
    if loaded.ByteSize() > INLINE:
        onnx.save(loaded, target, save_as_external_data=True, location=f"{Path(target).name}.data")
    else:
        onnx.save(loaded, target)


def build(
    name: str,
    models: Sequence[str],
    target: str,
    profiles: Mapping[str, Profile],
    sparse: bool,
    cache: bytes | None,
    inspect: bool,
) -> Built:
    """Write the engine of the first of these ONNX models that is understood. Raises ImpossibleError with the reason."""
    trt = library(name)
    log = logger(trt)
    trt.init_libnvinfer_plugins(log, "")  # some operators are plugins that come with the library
    builder = trt.Builder(log)
    network, _parser = _parsed(trt, log, builder, name, models)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    sparse = sparse and hasattr(trt.BuilderFlag, "SPARSE_WEIGHTS")
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if cache is not None:
        kept = config.create_timing_cache(cache)
        if kept is None or not config.set_timing_cache(kept, False):
            raise InputError(
                f"{NAMES[name]} does not take it; it is of another version or GPU", object="--timing-cache"
            )
    _profile(builder, config, network, name, profiles)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ImpossibleError(f"{NAMES[name]} cannot build an engine: {log.reason()}")
    data = memoryview(engine)
    Path(target).write_bytes(data)
    after = config.get_timing_cache() if cache is not None else None
    return Built(
        str(trt.__version__),
        _ports(network.get_input, network.num_inputs),
        _ports(network.get_output, network.num_outputs),
        sparse,
        _inspected(trt, log, data) if inspect and gpu() is None else None,
        bytes(after.serialize()) if after is not None else b"",
    )


def _parsed(trt: Any, log: Any, builder: Any, name: str, models: Sequence[str]) -> tuple[Any, Any]:
    """(network, its parser, which owns the weights). 11 and RTX type strongly whatever the flag; 10 has to be asked."""
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    why: list[ImpossibleError] = []
    for model in models:
        network = builder.create_network(0 if strong is None else 1 << int(strong))
        parser = trt.OnnxParser(network, log)
        if parser.parse_from_file(model):
            log.errors.clear()
            return network, parser
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        node, operator, reason = "", "the model", log.reason()
        if errors:
            node, operator, reason = errors[0].node_name(), errors[0].node_operator(), errors[0].desc()
        where = f"node '{node}'" if node else ""
        why.append(ImpossibleError(f"{NAMES[name]} cannot take {operator}: {reason}", object=where))
    raise why[0]


def _profile(builder: Any, config: Any, network: Any, name: str, profiles: Mapping[str, Profile]) -> None:
    """Tell the builder the sizes of dynamic inputs."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for k in range(network.num_inputs):
        port = network.get_input(k)
        if getattr(port, "is_shape_tensor", False):
            raise ImpossibleError(
                f"{NAMES[name]} needs this input's values, which are sizes, in advance", object=port.name
            )
        if -1 in tuple(port.shape):
            dynamic = True
            given = profiles[port.name]
            profile.set_shape(port.name, given.least, given.usual, given.most)
    if dynamic:
        config.add_optimization_profile(profile)


def _ports(get: Callable[[int], Any], count: int) -> dict[str, tuple[str, list[int]]]:
    ports = [get(k) for k in range(count)]
    return {str(port.name): (str(port.dtype).rpartition(".")[2].lower(), _sizes(port)) for port in ports}


def _sizes(port: Any) -> list[int]:
    """The shape; TensorRT cannot say that of outputs whose rank depends on data."""
    try:
        return [int(size) for size in port.shape]
    except ValueError:
        return []


def _inspected(trt: Any, log: Any, engine: memoryview) -> Any:
    """Layer by layer, with the kernels that were chosen, where the library tells."""
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text)
    except ValueError:
        return str(text)


# Running -------------------------------------------------------------------------------------------------------------


class Gpu:
    """The first GPU through NVIDIA's own driver: a context, a stream, memory, copies."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuInit", ctypes.c_uint(0))
        self._do("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)
        self._do("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))  # CU_STREAM_NON_BLOCKING
        self.stream = int(stream.value or 0)

    def _do(self, name: str, *args: Any) -> None:
        code = getattr(self.driver, name)(*args)
        if code == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise MachineError("out of memory on the GPU")
        if code:
            raise MachineError(f"the NVIDIA driver answers {code} to {name}")

    def allocate(self, size: int) -> int:
        """Address of new memory; it lives as long as the process."""
        found = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(max(size, 1)))
        return int(found.value)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._do("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array there."""
        self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), _size(array))

    def download(self, array: Array, address: int) -> None:
        """Copy what lies there into an array."""
        self._do("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), _size(array))

    def wait(self) -> None:
        """Until the stream is done."""
        self._do("cuStreamSynchronize", ctypes.c_void_p(self.stream))


def _size(array: Array) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


@dataclass
class Engine:
    """A loaded engine with buffers for one feed after the other."""

    trt: Any
    name: str
    made: Any
    gpu: Gpu = field(default_factory=Gpu)
    held: dict[str, tuple[int, int]] = field(default_factory=dict)  # {name: (address, bytes)}

    def __post_init__(self) -> None:
        self.context = self.made.create_execution_context()
        if self.context is None:
            raise MachineError(f"{NAMES[self.name]} cannot make room for the engine on the GPU")
        names = [self.made.get_tensor_name(k) for k in range(self.made.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.made.get_tensor_mode(name) == mode]
        self.outputs = [name for name in names if name not in self.inputs]

    def place(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Copy inputs to the GPU and make room for outputs, which are returned, still empty."""
        for name in self.inputs:
            if name not in feed:
                raise InputError("there is no value for this input", object=name)
            array = np.asarray(feed[name], self.trt.nptype(self.made.get_tensor_dtype(name)), order="C")
            if not self.context.set_input_shape(name, array.shape):
                raise InputError(f"shape {list(array.shape)} lies outside of the engine's profile", object=name)
            self.gpu.upload(self._room(name, array.nbytes), array)
        found = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if -1 in shape:
                raise ImpossibleError("the size of this output depends on data; it cannot be run here", object=name)
            found[name] = np.empty(shape, self.trt.nptype(self.made.get_tensor_dtype(name)))
            self._room(name, found[name].nbytes)
        return found

    def _room(self, name: str, size: int) -> int:
        """Address of at least so many bytes for an input or output."""
        address, there = self.held.get(name, (0, 0))
        if there < max(size, 1):
            if there:
                self.gpu.free(address)
            address = self.gpu.allocate(size)
            self.held[name] = (address, max(size, 1))
        self.context.set_tensor_address(name, address)
        return address

    def step(self) -> None:
        """One run on inputs that are in place."""
        if not self.context.execute_async_v3(self.gpu.stream):
            raise ImpossibleError(f"{NAMES[self.name]} cannot run the engine")
        self.gpu.wait()


@dataclass
class EngineSession:
    """An engine from a file, or that of an ONNX model, which is built for the sizes of each first feed."""

    name: str
    model: str
    engine: Engine | None = None
    built: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """{output: array}. Raises ImpossibleError with the library's reason."""
        engine = self._loaded(feed)
        found = engine.place(feed)
        engine.step()
        for name, array in found.items():
            engine.gpu.download(array, engine.held[name][0])
        return {name: array for name, array in found.items() if outputs is None or name in outputs}

    def bound(self, feed: Mapping[str, Array]) -> Callable[[], object]:
        """One run on inputs that lie on the GPU; outputs stay there."""
        engine = self._loaded(feed)
        engine.place(feed)
        return engine.step

    def _loaded(self, feed: Mapping[str, Array]) -> Engine:
        sizes = tuple(sorted((name, array.shape) for name, array in feed.items()))
        whole = self.model.endswith(ENGINES)
        if self.engine is not None and (whole or sizes == self.built):
            return self.engine
        trt = library(self.name)
        if whole:
            data = Path(self.model).read_bytes()
        else:
            profiles = {name: Profile(shape, shape, shape) for name, shape in sizes}
            with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
                copy, path = Path(folder) / "ready.onnx", Path(folder) / "engine"
                ready(self.model, str(copy))
                build(self.name, [str(copy), self.model], str(path), profiles, True, None, False)
                data = path.read_bytes()
        log = logger(trt)
        trt.init_libnvinfer_plugins(log, "")
        made = trt.Runtime(log).deserialize_cuda_engine(data)
        if made is None:
            raise ImpossibleError(f"{NAMES[self.name]} cannot load the engine: {log.reason()}")
        self.engine, self.built = Engine(trt, self.name, made), sizes
        return self.engine


@dataclass(frozen=True)
class EngineBackend:
    """TensorRT or TensorRT-RTX on the first GPU."""

    name: str

    def available(self) -> str | None:
        """None, or what is missing: the library, or a GPU."""
        try:
            library(self.name)
        except MachineError as error:
            return error.message
        return gpu()

    def session(self, model: str, *, threads: int = 1, optimise: bool = True) -> EngineSession:
        """Load .engine or .plan; .onnx is built when the first feed says its sizes. Other arguments change nothing."""
        return EngineSession(self.name, model)
