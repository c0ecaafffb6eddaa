"""A stand-in for NVIDIA's package: it offers what a release offers, and runs "engines" that are ONNX graphs.

A context computes with onnxruntime in the memory at the addresses it was given, in the stream it was given: the
host-memory CUDA driver calls it back when the stream gets there, also out of a graph that was captured. So what is
copied too late, launched with old addresses or freed too early gives wrong results or a problem, not silence.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["RtxConfig", "StandInTensorRt"]

INTERFACES = Path(__file__).parents[1] / "runtime" / "interfaces"
TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(bfloat16)": "BF16"}
DTYPES = {"FLOAT": np.float32, "HALF": np.float16}
ALIGNMENT = 256  # of addresses, in bytes, as IExecutionContext::setTensorAddress asks for
Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Logger:
    "ILogger"

    Severity = Severity


class StandInTensorRt:
    """The package of one release: "10.3" … "11.4" of TensorRT, or "rtx-1.7".

    * batches: smallest, optimal and largest batch of every engine's profile
    * faults: what is to fail: "load", "context", "shape", "address", "run"; "slow": as many seconds each run takes
    * problems: what was done wrong; live: how many objects of each class there are
    * cores: the DLA core of each engine that was loaded, -1 for none
    * executions: how often an engine ran; strategies: how TensorRT-RTX's contexts were told to capture CUDA graphs
    """

    def __init__(
        self,
        cuda: Any,
        release: str = "10.3",
        batches: tuple[int, int, int] = (2, 4, 8),
        faults: Mapping[str, Any] | None = None,
    ) -> None:
        self.__version__ = f"{release.removeprefix('rtx-')}.0"
        self.cores: list[int] = []
        self.cuda, self.batches, self.faults = cuda, batches, dict(faults or {})
        self.problems: list[str] = []
        self.live: dict[str, int] = {}
        self.executions = 0
        self.strategies: list[Any] = []
        classes = _classes(release)
        rtx = release.startswith("rtx")
        for part in (Logger, Runtime, RtxEngine if rtx else Engine, Context, *((RtxConfig, RtxCache) if rtx else ())):
            _check_offered(part, classes)
        for name in ("DataType", "TensorIOMode", *(("ComputeCapability", "CudaGraphStrategy") if rtx else ())):
            members = [word for word in classes[name] if word not in ("name", "value", "itemsize")]
            setattr(self, name, IntEnum(name, members, start=0))
        self.engine_class = RtxEngine if rtx else Engine
        self.ILogger = Logger
        self.Runtime = lambda logger: Runtime(self, logger)

    def check_current(self, what: str) -> None:
        """Notes a problem if no context of the device is current in this thread."""
        context = ctypes.c_void_p()
        if self.cuda.cuCtxGetCurrent(ctypes.byref(context)) == 0 and not context.value:
            self.problems.append(f"{what} without a current context")


@functools.cache
def _classes(release: str) -> dict[str, list[str]]:
    content: dict[str, list[str]] = json.loads((INTERFACES / f"tensorrt-{release}.json").read_text())["classes"]
    return content


@functools.cache
def _session(graph: bytes) -> Any:
    """onnxruntime's. Raises its exceptions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _check_offered(part: type, classes: Mapping[str, Sequence[str]]) -> None:
    """Or the stand-in would accept what the release does not."""
    offered = {name for base in part.__mro__ for name in vars(base) if not name.startswith("_")}
    name = part.__doc__ or ""
    assert offered <= set(classes[name]), (name, offered - set(classes[name]))


class Part:
    """An object of the package, counted while it lives."""

    def __init__(self, trt: StandInTensorRt, logger: Any, uses: Any = None) -> None:
        self._trt, self._logger, self._uses = trt, logger, uses
        self._users = 0
        if uses is not None:
            uses._users += 1
        self._count(+1)
        trt.check_current(f"{type(self).__name__} is made")

    def __del__(self) -> None:
        if self._users:
            self._trt.problems.append(f"{type(self).__name__} is freed before what uses it")
        if self._uses is not None:
            self._uses._users -= 1
        self._trt.check_current(f"{type(self).__name__} is freed")
        self._count(-1)

    def _count(self, change: int) -> None:
        name = type(self).__name__
        with _counting:
            self._trt.live[name] = self._trt.live.get(name, 0) + change

    def _say(self, text: str) -> None:
        self._logger.log(Severity.ERROR, text)


_counting = threading.Lock()


class Runtime(Part):
    "Runtime"

    engine_host_code_allowed = True
    DLA_core = -1  # not set

    def deserialize_cuda_engine(self, content: bytes) -> Any:
        assert self.engine_host_code_allowed is False
        self._trt.cores.append(self.DLA_core)
        try:
            if "load" in self._trt.faults:
                raise ValueError(self._trt.faults["load"])
            session = _session(content)
        except Exception:
            self._say("the engine plan file is not compatible")
            return None
        return self._trt.engine_class(self._trt, self._logger, self, session)


class Engine(Part):
    "ICudaEngine"

    def __init__(self, trt: StandInTensorRt, logger: Any, runtime: Runtime, session: Any) -> None:
        super().__init__(trt, logger, runtime)
        self._session = session
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = {value.name: value for value in session.get_outputs()}
        self._tensors = {**self._inputs, **self._outputs}
        self._output_shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        name: str = list(self._tensors)[index]
        return name

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt, "DataType")[TYPES[self._tensors[name].type]]  # noqa: B009 - set by name above

    def get_tensor_mode(self, name: str) -> Any:
        return getattr(self._trt, "TensorIOMode")["INPUT" if name in self._inputs else "OUTPUT"]  # noqa: B009

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name in self._inputs
        assert index == 0
        return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self._trt.batches]

    def _shapes_of_outputs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """For inputs of those shapes; what depends on their values is that for zeros."""
        key = tuple(shapes.items())
        if key not in self._output_shapes:
            dtypes = {name: np.dtype(DTYPES[self.get_tensor_dtype(name).name]) for name in shapes}
            zeros = {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
            results = self._session.run(None, zeros)
            self._output_shapes[key] = {name: found.shape for name, found in zip(self._outputs, results, strict=True)}
        return self._output_shapes[key]

    def create_execution_context(self, config: Any = None) -> Any:
        strategy = getattr(config, "cuda_graph_strategy", None)
        if strategy is not None:
            self._trt.strategies.append(strategy)
        if "context" in self._trt.faults:
            self._say("out of memory")
            return None
        return Context(self._trt, self._logger, self, config)


class Context(Part):
    "IExecutionContext"

    def __init__(self, trt: StandInTensorRt, logger: Any, engine: Engine, config: Any) -> None:
        super().__init__(trt, logger, engine)
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._runs: dict[Any, int] = {}
        self._set_up = False  # whether it has run with these shapes

    def __del__(self) -> None:
        for number in self._runs.values():
            del _runs[number]
        super().__del__()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fits = len(shape) == len(self._engine.get_tensor_shape(name)) and all(
            wanted in (-1, given) for wanted, given in zip(self._engine.get_tensor_shape(name), shape, strict=True)
        )
        dynamic = self._engine.get_tensor_shape(name)[0] == -1
        smallest, _, largest = self._trt.batches
        if "shape" in self._trt.faults or not fits or (dynamic and not smallest <= shape[0] <= largest):
            self._say(f"the shape {shape} of {name} is not in the profile")
            return False
        if self._shapes.get(name) != shape:
            self._set_up = False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        declared = self._engine.get_tensor_shape(name)
        known = -1 not in declared[1:] and len(self._shapes) == len(self._engine._inputs)
        return self._engine._shapes_of_outputs(self._shapes)[name] if -1 in declared and known else declared

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % ALIGNMENT:
            self._trt.problems.append(f"the address of {name} is not aligned: {address}")
        self._addresses[name] = address
        return "address" not in self._trt.faults

    def execute_async_v3(self, stream: int) -> bool:
        capturing = ctypes.c_int()
        self._trt.cuda.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing))
        if capturing.value and not self._set_up:
            self._say("the first run of a shape cannot be captured")
            return False
        if "run" in self._trt.faults:
            self._say("an illegal memory access was encountered")
            return False
        self._set_up = True
        code = self._trt.cuda.cuLaunchHostFunc(ctypes.c_void_p(stream), _callback, ctypes.c_void_p(self._run()))
        if code:
            self._say(f"cuLaunchHostFunc gave {code}")
        return bool(code == 0)

    def _run(self) -> int:
        """The number of a run with what is set now, for the callback."""
        key = (*self._shapes.items(), *self._addresses.items())
        if key not in self._runs:
            self._runs[key] = next(_numbers)
            _runs[self._runs[key]] = Run(self)
        return self._runs[key]


class Run:
    """The shapes and addresses of one run, as they are baked into what is in the stream."""

    def __init__(self, context: Context) -> None:
        self._context = weakref.ref(context)
        self._shapes = dict(context._shapes)
        self._session = context._engine._session
        names = [*context._engine._inputs, *context._engine._outputs]
        views = {name: _view(context, name) for name in names}
        self._inputs = {name: views[name] for name in context._engine._inputs}
        self._outputs = [views[name] for name in context._engine._outputs]

    def __call__(self) -> None:
        context = self._context()
        if context is None:
            return
        trt = context._trt
        try:
            if context._shapes != self._shapes:
                trt.problems.append(f"ran for {self._shapes}, but the context is set to {context._shapes}")
            trt.executions += 1
            time.sleep(trt.faults.get("slow", 0))
            for view, result in zip(self._outputs, self._session.run(None, self._inputs), strict=True):
                view[...] = result
        except Exception as error:  # must not leave a callback
            trt.problems.append(repr(error))


_runs: dict[int, Run] = {}
_numbers = itertools.count(1)


def _call(number: int) -> None:
    run = _runs.get(number)
    if run is not None:  # or its context is gone; the driver notes what still ran then
        run()


_callback = Callback(_call)


def _view(context: Context, name: str) -> Any:
    shape = context.get_tensor_shape(name)
    dtype = np.dtype(DTYPES[context._engine.get_tensor_dtype(name).name])
    size = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(context._addresses[name])
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


# --- TensorRT-RTX ------------------------------------------------------------------------------------------------


class RtxEngine(Engine):
    "ICudaEngine"

    def create_runtime_config(self) -> Any:
        return RtxConfig(self._trt, self._logger, self)


class RtxConfig(Part):
    "IRuntimeConfig"

    cuda_graph_strategy: Any = None
    _kernels: Any = None

    def create_runtime_cache(self) -> Any:
        return RtxCache(self._trt, self._logger)

    def set_runtime_cache(self, cache: Any) -> bool:
        self._kernels = cache
        return True


class RtxCache(Part):
    "IRuntimeCache"

    _content = b""

    def deserialize(self, content: bytes) -> bool:
        self._trt.check_current("the kernels are read")
        fits = content.startswith(b"kernels")
        if fits:
            self._content = content
        return fits

    def serialize(self) -> Any:
        return self._content or b"kernels, compiled here"
