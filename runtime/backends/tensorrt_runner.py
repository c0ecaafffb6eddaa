"""Runs engines of TensorRT and TensorRT-RTX, and reads back what is in them; both need a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cuda import Buffer, Cuda, Stream
from ..errors import DeviceError, EngineError
from ..specs import TensorSpec
from .base import Runner
from .tensorrt_builder import product_of, spec_of
from .tensorrt_log import logger_of, recorded

__all__ = ["TensorRtRunner", "inspected", "load_engine"]

PROFILE = 0  # the builder adds one


def load_engine(trt: ModuleType, engine: bytes) -> tuple[Any, Any]:
    """The runtime and the engine, which must be freed before it. Raises `EngineError` if it does not load."""
    with recorded(trt) as log:
        runtime = trt.Runtime(logger_of(trt))
        runtime.engine_host_code_allowed = False  # the default; an engine is data, and stays so
        loaded = runtime.deserialize_cuda_engine(engine) if engine else None
    if loaded is None:
        raise EngineError(
            f"{product_of(trt)} {trt.__version__} cannot load the engine: {log.cause() or 'it is empty'}",
            "an engine loads with the version and on the kind of GPU it was built for; build it again",
        )
    return runtime, loaded


def inspected(trt: ModuleType, engine: bytes) -> str:
    """The inspector's JSON, with the kernels as they run at the smallest batch of the profile.

    Raises `EngineError` if the engine does not load.
    """
    runtime, loaded = load_engine(trt, engine)
    context = _context(trt, loaded)
    # Without shapes the inspector leaves out the types of all tensors that depend on the batch.
    for spec in _specs(trt, loaded, inputs=True):
        _set_shape(context, spec.name, _shapes(loaded, spec)[0])
    inspector = loaded.create_engine_inspector()
    inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, context, loaded, runtime  # in this order: each uses those behind it
    return text


class TensorRtRunner(Runner):
    """An engine with buffers for the largest batch of its profile, on a stream of its own."""

    def __init__(self, trt: ModuleType, engine: bytes, cuda: Cuda) -> None:
        self._runtime, self._engine = load_engine(trt, engine)
        self._trt = trt
        super().__init__(_specs(trt, self._engine, inputs=True), _specs(trt, self._engine, inputs=False))
        self._context = _context(trt, self._engine)
        shapes = {spec.name: _shapes(self._engine, spec) for spec in self.inputs}
        self._smallest_batch = max(smallest[0] for smallest, _ in shapes.values())
        self._largest_batch = min(largest[0] for _, largest in shapes.values())
        with ExitStack() as stack:
            self._stream = Stream(cuda)
            stack.callback(self._stream.close)
            self._buffers: dict[str, Buffer] = {}
            for name, (shape, dtype) in self._largest().items():
                self._buffers[name] = Buffer(cuda, shape, dtype)
                stack.callback(self._buffers[name].close)
            self._memory = stack.pop_all()

    def infer_impl(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """As many runs as the profile's largest batch needs; a batch below its smallest is filled up with zeros.

        Raises `DeviceError` if the GPU fails.
        """
        images = len(next(iter(feeds.values())))
        starts = range(0, images, self._largest_batch)
        parts = [
            self._run({name: array[start : start + self._largest_batch] for name, array in feeds.items()})
            for start in starts
        ]
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self.outputs}

    def _run(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """One run: to the device, through the engine, back."""
        images = len(next(iter(feeds.values())))
        for name, array in feeds.items():
            filled = _filled(array, self._smallest_batch)
            _set_shape(self._context, name, filled.shape)
            self._buffers[name].upload(filled, self._stream)
        for name, buffer in self._buffers.items():
            if not self._context.set_tensor_address(name, buffer.address):
                raise EngineError(f"the engine refused the memory of {name!r}")
        with recorded(self._trt) as log:
            if not self._context.execute_async_v3(int(self._stream)):
                raise DeviceError(f"the engine did not run: {log.cause() or 'TensorRT gives no reason'}")
        results = {
            spec.name: self._buffers[spec.name].download(tuple(self._context.get_tensor_shape(spec.name)), self._stream)
            for spec in self.outputs
        }
        self._stream.synchronize()
        return {name: array[:images].astype(np.float32) for name, array in results.items()}

    def close_impl(self) -> None:
        """Device memory, then TensorRT's objects, each before what it uses."""
        try:
            self._memory.close()
        finally:
            self._context = self._engine = self._runtime = None

    def _largest(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Each tensor's shape at the largest batch, and its type; the outputs' follow from the inputs'."""
        for spec in self.inputs:
            _set_shape(self._context, spec.name, _shapes(self._engine, spec)[1])
        return {
            spec.name: (tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            for spec in (*self.inputs, *self.outputs)
        }


def _filled(batch: NDArray[np.float32], smallest: int) -> NDArray[np.float32]:
    """The batch, with images of zeros behind it if it is below the smallest that the engine takes."""
    missing = smallest - len(batch)
    return batch if missing <= 0 else np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])


def _context(trt: ModuleType, engine: Any) -> Any:
    with recorded(trt) as log:
        context = engine.create_execution_context()
    if context is None:
        raise DeviceError(
            f"{product_of(trt)} cannot prepare the engine: {log.cause()}", "it may need more memory than is free"
        )
    return context


def _set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    if not context.set_input_shape(name, shape):
        raise EngineError(f"the engine refused the shape {list(shape)} of {name!r}")


def _shapes(engine: Any, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest and the largest shape of an input."""
    fixed = tuple(side for side in spec.shape if side is not None)
    if len(fixed) == len(spec.shape):
        return fixed, fixed
    smallest, _, largest = engine.get_tensor_profile_shape(spec.name, PROFILE)
    return tuple(smallest), tuple(largest)


def _specs(trt: ModuleType, engine: Any, *, inputs: bool) -> tuple[TensorSpec, ...]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(
        spec_of(name, engine.get_tensor_shape(name), engine.get_tensor_dtype(name))
        for name in names
        if (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT) == inputs
    )
