"""Builds an engine with TensorRT or TensorRT-RTX: one code for both packages, from TensorRT 10.3 to 11.

Precision lies in the graph: FP16 tensors, or explicit Q/DQ. The network is strongly typed, so the builder may not
change it; weak typing, where it may, is gone in TensorRT 11. Every call that can fail says so by None or False, and
each is checked here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import BuildError
from ..specs import BatchProfile, TensorSpec
from .base import BuildRequest
from .tensorrt_log import Log, logger_of, one_line, recorded

__all__ = ["Plan", "build_engine", "product_of", "spec_of"]

DYNAMIC = -1  # TensorRT's size of an axis that is not fixed
NO_IMPORTER = "Plugin not found"  # what the parser says of an operator that it does not know
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_one_build = threading.Lock()  # another build's layers would come into the log, and TensorRT-RTX has state, see below


@dataclass(frozen=True)
class Plan:
    """What the builder made.

    * engine: the serialized plan; profile: the batch sizes that it takes
    * listing: the log's detailed messages, with the layers of the engine
    * timing_cache: empty where the package keeps none
    """

    engine: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: BatchProfile
    listing: tuple[str, ...]
    timing_cache: bytes


def build_engine(trt: ModuleType, request: BuildRequest, compute_capability: str | None = None) -> Plan:
    """Builds the graph of `request` with the package `trt`.

    `compute_capability` names the GPU architecture to build for, as in `trt.ComputeCapability` ("SM86"), None for the
    GPU of this machine; only TensorRT-RTX builds for another. Raises `BuildError` with TensorRT's own words.
    """
    with _one_build, recorded(trt) as log:
        return _built(trt, request, compute_capability, log)


def product_of(trt: ModuleType) -> str:
    """The package's name in messages."""
    return "TensorRT-RTX" if hasattr(trt, "ComputeCapability") else "TensorRT"


def spec_of(name: str, shape: Sequence[int], dtype: Any) -> TensorSpec:
    """A tensor of a network or an engine; `dtype` is a `DataType`."""
    return TensorSpec(
        name,
        tuple(None if side == DYNAMIC else int(side) for side in shape),
        DTYPES.get(dtype.name, dtype.name.lower()),
    )


def _built(trt: ModuleType, request: BuildRequest, compute_capability: str | None, log: Log) -> Plan:
    builder = trt.Builder(logger_of(trt))
    # Needed up to 10.x, ignored from 11 on, where networks are always strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger_of(trt))  # holds the weights: must live until the engine is built
    _parse(trt, parser, request.onnx, log)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    if not inputs or not outputs:
        raise BuildError(f"{product_of(trt)} finds no inputs and outputs in the graph", "is the file an ONNX graph?")
    config = builder.create_builder_config()
    profile = _add_profile(builder, config, inputs, request)
    _configure(trt, config, request, compute_capability)
    cache = _timing_cache(trt, config, request.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        error = _refused(trt, request, log)
        if compute_capability is not None:
            _forget_target(trt)
        raise error
    return Plan(
        engine=bytes(plan),
        inputs=tuple(spec_of(tensor.name, tensor.shape, tensor.dtype) for tensor in inputs),
        outputs=tuple(spec_of(tensor.name, tensor.shape, tensor.dtype) for tensor in outputs),
        profile=profile,
        listing=tuple(log.details),
        timing_cache=b"" if cache is None else bytes(cache.serialize()),
    )


def _parse(trt: ModuleType, parser: Any, graph: bytes, log: Log) -> None:
    if parser.parse(graph):
        return
    errors = [_parser_error(trt, parser.get_error(index)) for index in range(parser.num_errors)]
    cause = "; ".join(dict.fromkeys(errors)) or log.cause(without_driver=True) or "it gives no reason"
    raise BuildError(f"{product_of(trt)} cannot read the graph: {cause}")


def _parser_error(trt: ModuleType, error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    description = error.desc()
    if NO_IMPORTER in description:
        return f"{product_of(trt)} has no importer for operator {operator} (node {name})"
    facts = [line for line in description.splitlines() if "catchCudaError" not in line]
    where = f"node {name} ({operator}): " if name or operator else ""
    return where + one_line(" ".join(facts))


def _add_profile(builder: Any, config: Any, inputs: Sequence[Any], request: BuildRequest) -> BatchProfile:
    """The batch sizes that the engine will take; tells the builder, if the graph's batch is dynamic."""
    wanted = request.profile
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    for name, shape in shapes.items():
        if DYNAMIC in shape[1:]:
            raise BuildError(
                f"input {name!r} has the shape {list(shape)}: only the batch, its first axis, may be dynamic"
            )
    dynamic = {name: shape[1:] for name, shape in shapes.items() if shape[:1] == (DYNAMIC,)}
    if not dynamic:
        fixed = next((shape[0] for shape in shapes.values() if shape), 1)
        return BatchProfile(fixed, fixed, fixed)
    if request.dla is not None and wanted.minimum != wanted.maximum:
        raise BuildError(
            f"the DLA takes one batch size, given were {wanted.minimum} to {wanted.maximum}",
            "give the same minimum, optimum and maximum",
        )
    profile = builder.create_optimization_profile()
    for name, rest in dynamic.items():
        profile.set_shape(name, *((batch, *rest) for batch in (wanted.minimum, wanted.optimum, wanted.maximum)))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"the batch sizes {wanted} were refused", "give minimum ≤ optimum ≤ maximum")
    return wanted


def _configure(trt: ModuleType, config: Any, request: BuildRequest, compute_capability: str | None) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the layers are not listed
    # FP32 is to mean FP32. TF32 is on by default, keeps 10 bits of the mantissa, and no listing shows it.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if request.dla is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = request.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if compute_capability is not None:
        _set_target(trt, config, compute_capability)


def _set_target(trt: ModuleType, config: Any, compute_capability: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    capability = getattr(known, compute_capability, None)
    if capability is None:
        raise BuildError(f"{product_of(trt)} cannot build for {compute_capability.lower()}", "choose another target")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(capability, 0):
        raise BuildError(f"{product_of(trt)} refused the target {compute_capability.lower()}", "choose another target")


def _timing_cache(trt: ModuleType, config: Any, content: bytes) -> Any | None:
    """What the builder measures goes in here; None for TensorRT-RTX, which measures nothing at build time."""
    if hasattr(trt, "ComputeCapability"):
        return None
    cache = config.create_timing_cache(content)
    # False: a cache of another device or version is refused. It only saves time, so begin with an empty one.
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise BuildError("TensorRT refused an empty timing cache", "this version of TensorRT is not supported")
    return cache


def _refused(trt: ModuleType, request: BuildRequest, log: Log) -> BuildError:
    cause = log.cause(without_driver=request.target is not None) or "it gives no reason"
    target = f" for {request.target}" if request.target else ""
    remedy = ""
    if "workspace" in cause:
        limit = "none" if request.workspace is None else f"{request.workspace:,} B"
        remedy = f"raise the limit of the workspace (now {limit}), or build for smaller batches"
    return BuildError(f"{product_of(trt)} built no engine{target}: {cause}", remedy)


def _forget_target(trt: ModuleType) -> None:
    """Builds a network of one copy, to be thrown away.

    TensorRT-RTX 1.7 compiles the network that follows a failed build for the target of the failed one: an INT8 network
    for sm86 becomes FP16 behind one that failed for sm75. One build ends that.
    """
    builder = trt.Builder(logger_of(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    copied = network.add_input("x", trt.DataType.FLOAT, (1,))
    network.mark_output(network.add_identity(copied).get_output(0))
    builder.build_serialized_network(network, builder.create_builder_config())
