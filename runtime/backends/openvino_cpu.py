"""OpenVINO on the CPU. The engine file is the ONNX graph with its precision stamped on; it is compiled when loaded.

OpenVINO takes the precision of what the graph leaves in floating point from an option, and on processors with BF16 that
option is BF16 unless something else is said. So the precision has to travel with the graph: it stands in the file as
the last entry of ONNX's `metadata_props`, and the file is still an ONNX file to every other tool.

A graph with a dynamic batch is compiled twice. With fixed shapes a run at batch 1 takes up to a quarter less time
(EfficientNet-B0, INT8, 64×64: 0.70 against 0.91 of onnxruntime's FP32), and that is what an edge device runs; the other
batches go to a second copy with dynamic shapes, made when the first of them comes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit import audited
from ..errors import BuildError, EngineError
from ..installed import installed_version
from ..specs import Kernel, PlannedLayer, TensorSpec
from .base import Absence, Backend, BuildRequest, Compiled, KernelTime
from .naming import layer_run_by
from .runner import Runner

__all__ = ["OpenVinoBackend"]

DEVICE = "CPU"
TELEMETRY = "openvino_telemetry"
INT8_AND_BF16 = "int8+bf16"
"""INT8 whose other layers run in BF16: asked for by planning them so, and stamped on the engine."""
REMAINDERS = {"fp32": "f32", "bf16": "bf16", "int8": "f32", INT8_AND_BF16: "bf16"}
"""By precision, what runs the layers that the graph leaves in floating point: INFERENCE_PRECISION_HINT."""
CAPABILITIES = {"bf16": "BF16", "int8": "INT8"}
"""By precision, what the processor must have: an entry of OPTIMIZATION_CAPABILITIES."""
STAMP_KEY = "edgewright.precision"
METADATA_PROPS = 14  # field of ModelProto in onnx.proto; its entries are StringStringEntryProto: 1 = key, 2 = value
LENGTH_DELIMITED = 2  # wire type of protobuf
INSTALL = "pip install 'edgewright[openvino]'"
BUILD_AGAIN = "build it again"
COMPUTE_KINDS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
NOT_LAUNCHED = ("Input", "Output", "Const")
PRECISION_OF_TYPE = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8", "f64": "fp64"}
ENDINGS = ("/", "::")
"""What OpenVINO sets between a node's name and its own: "fc/Gemm/WithoutBiases"."""
FRAMES = ("Exception from ", "Check '", "FrontEnd API failed", "Model wasn't fully converted", "Summary:")
"""How the lines of OpenVINO's messages begin that say where it failed, not why."""


class OpenVinoBackend(Backend):
    """FP32 graphs in FP32 or BF16, and explicit-Q/DQ INT8 graphs with an FP32 or BF16 remainder, on the CPU."""

    name = "openvino"
    precisions = ("fp32", "bf16", "int8")
    dialect = "openvino"
    suffix = ".onnx"

    def absence(self) -> Absence | None:
        """The package is installed and loads, or not."""
        if importlib.util.find_spec("openvino") is None:
            return Absence("package_missing", "the package openvino is not installed", INSTALL)
        try:
            _openvino()
        except (ImportError, OSError, EngineError) as error:
            return Absence("package_missing", f"the package openvino does not load: {error}", INSTALL)
        return None

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        """A precision that the processor has no instructions for would be emulated, or silently be another one."""
        needed = CAPABILITIES.get(precision)
        if needed is None or needed in _capabilities():
            return None
        return Absence(
            "precision_unsupported", f"this processor has no {needed} arithmetic", "choose another precision"
        )

    def version(self) -> str:
        """Of the installed distribution; one that was built from source, without a wheel, may have none."""
        return installed_version("openvino") or "unknown"

    def compile(self, request: BuildRequest) -> Compiled:
        """Compiles the graph for one image and for any batch, runs one image of zeros, and reads the kernels back.

        Raises `BuildError` as well if a planned layer runs in one precision at batch 1 and in another otherwise.
        """
        precision = _with_remainder(request)
        try:
            model, settings = _read(request.onnx), _settings(precision, threads=0)
            single, several = _compiled(_of_one_image(model), settings), _compiled(model, settings)
            inputs, outputs = _specs(model.inputs), _specs(model.outputs)
            _run(_request(single), [np.zeros([side or 1 for side in spec.shape], spec.dtype) for spec in inputs])
        except EngineError as error:
            raise BuildError(f"openvino refused the {request.precision} graph: {error.message}") from error
        kernels = _kernels(single, request.planned)
        _check_equal_precisions(request.planned, kernels, _kernels(several, request.planned))
        engine = request.onnx + _stamp(precision)
        return Compiled(engine, inputs, outputs, kernels, {"openvino": self.version()})

    def kernel_times(
        self, engine: bytes, planned: tuple[PlannedLayer, ...], *, threads: int, runs: int
    ) -> tuple[KernelTime, ...]:
        """Means: OpenVINO keeps no more."""
        model = _read(engine)
        settings = _settings(_stamped_precision(engine), threads=threads) | {"PERF_COUNT": True}
        compiled = _compiled(_of_one_image(model), settings)
        request = _request(compiled)
        feeds = [np.zeros([side or 1 for side in spec.shape], spec.dtype) for spec in _specs(model.inputs)]
        for _ in range(runs):
            _run(request, feeds)
        seconds = {entry.node_name: entry.real_time.total_seconds() for entry in request.get_profiling_info()}
        return tuple(KernelTime(kernel, 1e3 * seconds.get(kernel.name, 0.0)) for kernel in _kernels(compiled, planned))

    def engine_of(self, graph: bytes) -> bytes:
        """The graph, stamped to be run in FP32."""
        return graph + _stamp("fp32")

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        """Compiles the graph for one image, in the precision that is stamped on it."""
        absence = self.absence()
        if absence is not None:
            raise EngineError(absence.reason, absence.hint)
        if provider:
            raise EngineError(f"openvino has no providers, asked for was {provider!r}", "leave it out")
        settings = _settings(_stamped_precision(engine), threads=threads)
        return OpenVinoRunner(CompiledGraph(_read(engine), settings))


class OpenVinoRunner(Runner):
    """Runs the compiled graph, one copy for one image and, once it is needed, one for any other batch."""

    def __init__(self, graph: CompiledGraph) -> None:
        super().__init__(graph.inputs, graph.outputs)
        self._graph: Any = graph
        self._single: Any = _request(graph.single)
        self._several: Any = None

    def infer_impl(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """One run; the first with a batch other than 1 compiles the graph once more."""
        arrays = [feeds[spec.name] for spec in self.inputs]
        results = _run(self._request_for(arrays), arrays)
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def sibling_impl(self) -> OpenVinoRunner:
        """An own request on the same compiled graph."""
        return OpenVinoRunner(self._graph)

    def _request_for(self, arrays: Sequence[NDArray[np.float32]]) -> Any:
        if all(_fits_one_image(spec, array) for spec, array in zip(self.inputs, arrays, strict=True)):
            return self._single
        if self._several is None:
            self._several = _request(self._graph.several)
        return self._several

    def close_impl(self) -> None:
        """The memory goes with the last reference."""
        self._graph = self._single = self._several = None


class CompiledGraph:
    """What runners share: the graph compiled for one image, and for any batch from when that is first asked for."""

    def __init__(self, model: Any, settings: Mapping[str, Any]) -> None:
        self.inputs, self.outputs = _specs(model.inputs), _specs(model.outputs)
        self.single = _compiled(_of_one_image(model), settings)
        self._model, self._settings = model, settings
        self._lock = threading.Lock()

    @functools.cached_property
    def _any_batch(self) -> Any:
        return _compiled(self._model, self._settings)

    @property
    def several(self) -> Any:
        """For any batch; compiled once, whichever thread comes first."""
        with self._lock:
            return self._any_batch


def _fits_one_image(spec: TensorSpec, array: NDArray[np.float32]) -> bool:
    """Whether `array`, which fits `spec`, also fits it with a batch of 1 where `spec` has a dynamic one."""
    return spec.shape[:1] != (None,) or array.shape[0] == 1


def _with_remainder(request: BuildRequest) -> str:
    """The precision asked for, a key of `REMAINDERS`."""
    planned = {layer.precision for layer in request.planned}
    return INT8_AND_BF16 if request.precision == "int8" and "bf16" in planned else request.precision


def _stamp(precision: str) -> bytes:
    """An entry of `metadata_props`; appended to a serialized graph it is its last one, as protobuf adds up lists."""
    entry = _field(1, STAMP_KEY.encode()) + _field(2, precision.encode())
    return _field(METADATA_PROPS, entry)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field; number below 16 and length below 128 take one byte each."""
    return bytes([number << 3 | LENGTH_DELIMITED, len(content)]) + content


def _stamped_precision(engine: bytes) -> str:
    for precision in REMAINDERS:
        if engine.endswith(_stamp(precision)):
            return precision
    raise EngineError("openvino cannot load the engine: it does not end with its precision", BUILD_AGAIN)


def _settings(precision: str, *, threads: int) -> dict[str, Any]:
    """Options for one image after the other, as soon as possible; 0 threads are all cores."""
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": REMAINDERS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # nothing is quantized that the graph does not quantize
    }
    return settings | ({"INFERENCE_NUM_THREADS": threads} if threads else {})


def _openvino() -> Any:
    """The library, imported without its telemetry.

    That would report the import over the network, from a fork of this process, and leave files in the user's home. None
    in `sys.modules` stands for a package that is not installed; then OpenVINO takes a stub of its own instead.
    """
    if "openvino" in sys.modules:  # whoever imported it has decided
        return sys.modules["openvino"]
    modules: dict[str, Any] = sys.modules
    hidden = modules.get(TELEMETRY)
    modules[TELEMETRY] = None
    try:
        return importlib.import_module("openvino")
    finally:
        del modules[TELEMETRY]
        if hidden is not None:
            modules[TELEMETRY] = hidden


@functools.cache
def _core() -> Any:
    """The one of this process, kept for good.

    A Core gives the thread a signal stack and takes away its memory when it is freed. With several of them the thread
    is left with a stack that is gone, and the next signal, Ctrl-C for one, is a segmentation fault (OpenVINO 2026.4).
    """
    return _openvino().Core()


def _capabilities() -> Sequence[str]:
    """What the processor can compute with: "FP32", "BF16", "INT8", …"""
    with _own_errors("cannot ask the processor"):
        found: Sequence[str] = _core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return found


def _read(graph: bytes) -> Any:
    with _own_errors("cannot load the graph", BUILD_AGAIN):
        return _core().read_model(graph)


def _of_one_image(model: Any) -> Any:
    """A copy of `model` whose dynamic batch is 1; weights are shared."""
    copy = model.clone()
    fixed = {port: _with_batch_of_one(port.get_partial_shape()) for port in copy.inputs}
    with _own_errors("cannot fix the batch at 1"):
        copy.reshape(fixed)
    return copy


def _with_batch_of_one(shape: Any) -> Any:
    sides = list(shape)
    if sides and sides[0].is_dynamic:
        shape = _openvino().PartialShape([1, *sides[1:]])
    return shape


def _compiled(model: Any, settings: Mapping[str, Any]) -> Any:
    with _own_errors("cannot compile the graph", BUILD_AGAIN):
        return _core().compile_model(model, DEVICE, dict(settings))


def _request(compiled: Any) -> Any:
    """What runs a compiled graph; it keeps it alive."""
    with _own_errors("cannot prepare a run"):
        return compiled.create_infer_request()


def _run(request: Any, arrays: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The outputs in their order, copied out of OpenVINO's memory; the inputs are read where they are."""
    with _own_errors("cannot run the graph"):
        results = request.infer(dict(enumerate(arrays)), share_inputs=True, share_outputs=False)
    return [results[index] for index in range(len(results))]


@contextmanager
def _own_errors(fact: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its exceptions share no base class but Exception
        raise EngineError(f"openvino {fact}: {_telling_line(error)}", remedy) from error


def _telling_line(error: Exception) -> str:
    """The first line that says why; above it stands where in OpenVINO's sources."""
    lines = [line.removeprefix("-- ").strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(FRAMES)]
    return (telling or [line for line in lines if line] or [repr(error)])[0]


def _specs(ports: Any) -> tuple[TensorSpec, ...]:
    """Of the ports of a model as it was read; compiling may give a tensor further names."""
    return tuple(
        TensorSpec(
            port.get_any_name(),
            tuple(None if side.is_dynamic else side.get_length() for side in port.get_partial_shape()),
            port.get_element_type().to_dtype().name,
        )
        for port in ports
    )


def _check_equal_precisions(
    planned: tuple[PlannedLayer, ...], single: Sequence[Kernel], several: Sequence[Kernel]
) -> None:
    for one, any_batch in zip(audited(planned, single), audited(planned, several), strict=True):
        if one.actual != any_batch.actual:
            raise BuildError(
                f"openvino runs {one.name} in {one.actual} at batch 1 and in {any_batch.actual} at others",
                "leave the layer in floating point",
            )


def _kernels(compiled: Any, planned: tuple[PlannedLayer, ...]) -> tuple[Kernel, ...]:
    """What one run launches, in its order: not the constants, nor what is computed of them alone beforehand."""
    kernels: list[Kernel] = []
    constant: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        name, kind = node.get_friendly_name(), _detail(node, "layerType")
        sources = [value.get_node().get_friendly_name() for value in node.input_values()]
        if kind == "Const" or (sources and constant.issuperset(sources)):
            constant.add(name)
        elif kind not in NOT_LAUNCHED:
            kernels.append(_kernel(node, name, kind, planned))
    return tuple(kernels)


def _kernel(node: Any, name: str, kind: str, planned: tuple[PlannedLayer, ...]) -> Kernel:
    computes = any(word in kind for word in COMPUTE_KINDS)
    # The widest type among the operands, which for a convolution are its data and its weights.
    kind_of_data = _detail(node, "runtimePrecision")
    return Kernel(
        name=name,
        kind=f"{kind} {_detail(node, 'primitiveType')}",
        sources=_sources(_detail(node, "originalLayersNames").split(","), planned) if computes else (),
        precision=PRECISION_OF_TYPE.get(kind_of_data, kind_of_data),
        bytes_read=_bytes_of(node.input_values()),
        bytes_written=_bytes_of(node.outputs()),
        computes=computes,
    )


def _sources(originals: Sequence[str], planned: tuple[PlannedLayer, ...]) -> tuple[str, ...]:
    """The planned layers among the nodes that were fused into a kernel.

    By their own names if possible: among the nodes fused there may also be the activation behind them, whose name is an
    alias, and "relu_1" is not to be taken for the "relu" of another layer.
    """
    unaliased = tuple(replace(layer, aliases=()) for layer in planned)
    for candidates in (unaliased, planned):
        found = dict.fromkeys(layer for name in originals for layer in layer_run_by(name, candidates, endings=ENDINGS))
        if found:
            return tuple(found)
    return ()


def _detail(node: Any, key: str) -> str:
    """A fact that OpenVINO notes on a node of the graph that it runs; "" if it does not."""
    details = node.get_rt_info()
    return str(details[key].value) if key in details else ""


def _bytes_of(values: Any) -> int | None:
    """The sum over all tensors; None where a shape is not known before the run."""
    total = 0
    for value in values:
        shape = value.get_partial_shape()
        if shape.is_dynamic:
            return None
        total += int(np.prod(shape.to_shape(), dtype=np.int64)) * value.get_element_type().size
    return total
