"""A deserialized engine of TensorRT or TensorRT-RTX, shared by all that run it, and what the inspector says of it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cuda.driver import CudaDriver
from ..errors import DeviceMemoryError, EngineError
from ..specs import TensorSpec
from .runner import check_dtypes
from .tensorrt_builder import product_of, spec_of
from .tensorrt_log import logger_of, recorded
from .tensorrt_rtx_settings import RtxSettings, kept_kernels

__all__ = ["LoadedEngine", "inspected", "load_engine", "shape_of", "shape_refused"]

PROFILE = 0  # the builder adds one


def load_engine(trt: ModuleType, engine: bytes, dla: int | None = None) -> tuple[Any, Any]:
    """The runtime and the engine, which must be freed before it; `dla` is the core that it was built for.

    Raises `EngineError` if it does not load.
    """
    with recorded(trt) as log:
        runtime = trt.Runtime(logger_of(trt))
        runtime.engine_host_code_allowed = False  # the default; an engine is data, and stays so
        if dla is not None:
            runtime.DLA_core = dla
        loaded = runtime.deserialize_cuda_engine(engine) if engine else None
    if loaded is None:
        del runtime  # now, not when somebody lets go of the error
        raise EngineError(
            f"{product_of(trt)} {trt.__version__} cannot load the engine: {log.cause() or 'it is empty'}",
            "an engine loads with the version and on the kind of GPU it was built for; build it again",
        )
    return runtime, loaded


def inspected(trt: ModuleType, engine: bytes, dla: int | None = None) -> str:
    """The inspector's JSON, with the kernels as they run at the smallest batch of the profile.

    Raises `EngineError` if the engine does not load, or has tensors that cannot be run in batches.
    """
    runtime, loaded = load_engine(trt, engine, dla)
    inputs = _specs(trt, loaded, inputs=True)
    _check_axes(inputs, _specs(trt, loaded, inputs=False))
    context = loaded.create_execution_context()
    if context is None:
        raise EngineError(f"{product_of(trt)} cannot prepare the engine", "it probably needs more memory than is free")
    # Without shapes the inspector leaves out the types of all tensors that depend on the batch.
    for spec in inputs:
        shape = shape_of(spec, _batches(loaded, spec)[0])
        if not context.set_input_shape(spec.name, shape):
            raise shape_refused(spec, shape)
    inspector = loaded.create_engine_inspector()
    inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, context, loaded, runtime  # in this order: each uses those behind it
    return text


class LoadedEngine:
    """An engine on the GPU with the driver behind it; both go when the last of those that `acquire` it lets go.

    * inputs, outputs: its tensors
    * smallest_batch, largest_batch: what its profile takes
    * driver: CUDA's; captures: whether its runs are to be captured as CUDA graphs
    """

    def __init__(
        self,
        trt: ModuleType,
        engine: bytes,
        driver: CudaDriver,
        kernels: Path | None = None,
        dla: int | None = None,
    ) -> None:
        """Takes over `driver`, also where it raises.

        `kernels` is the file of TensorRT-RTX's runtime cache; `dla` the core that the engine was built for.
        """
        self.trt = trt
        self.driver = driver
        self._users = 1
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._settings: RtxSettings | None = None
        with ExitStack() as failing:
            failing.callback(self._free)
            with driver.current():
                self._load(engine, kernels, dla)
            failing.pop_all()
        self.captures = driver.captures and (self._settings is None or not self._settings.captures)

    def acquire(self) -> LoadedEngine:
        """Itself, for one more user; each must `release` it."""
        with self._lock:
            self._users += 1
        return self

    def release(self) -> None:
        """Lets go; the last one frees it. Its contexts must be gone by then."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._free()

    def create_context(self) -> Any:
        """What runs the engine, with scratch memory of its own. Raises `DeviceMemoryError`."""
        options = [] if self._settings is None else [self._settings.config]
        with self._lock, recorded(self.trt) as log:
            context = self._engine.create_execution_context(*options)
        if context is None:
            raise DeviceMemoryError(
                f"{product_of(self.trt)} cannot prepare the engine: {log.cause() or 'it gives no reason'}",
                "it probably needs more memory than is free; build it for smaller batches",
            )
        return context

    def _load(self, engine: bytes, kernels: Path | None, dla: int | None) -> None:
        kept = b"" if kernels is None else kept_kernels(kernels)
        self._runtime, self._engine = load_engine(self.trt, engine, dla)
        self.inputs = _specs(self.trt, self._engine, inputs=True)
        self.outputs = _specs(self.trt, self._engine, inputs=False)
        _check_axes(self.inputs, self.outputs)
        check_dtypes((*self.inputs, *self.outputs))
        batches = [_batches(self._engine, spec) for spec in self.inputs]
        self.smallest_batch = max(smallest for smallest, _ in batches)
        self.largest_batch = min(largest for _, largest in batches)
        if kernels is not None:
            self._settings = RtxSettings(self.trt, self._engine, kernels, kept)

    def _free(self) -> None:
        """TensorRT's objects, each before what it uses, and then the driver."""
        with ExitStack() as freeing:
            freeing.callback(self.driver.close)
            freeing.callback(self._forget)  # even where the device's context is gone
            with self.driver.current():
                if self._settings is not None:
                    self._settings.save()
                self._forget()

    def _forget(self) -> None:
        self._settings = None
        self._engine = None
        self._runtime = None


def shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """Of an input with `batch` images."""
    return tuple(batch if side is None else side for side in spec.shape)


def shape_refused(spec: TensorSpec, shape: tuple[int, ...]) -> EngineError:
    """What to raise where a context does not take a shape."""
    return EngineError(f"the engine refused the shape {list(shape)} of {spec.name!r}")


def _check_axes(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Raises `EngineError` unless all tensors have the batch as their first axis; batches are split along it."""
    if not inputs or not outputs:
        raise EngineError("the engine has no inputs or no outputs", "build it again")
    batch = inputs[0].shape[:1]
    for spec in (*inputs, *outputs):
        if not spec.shape or spec.shape[:1] != batch or (spec in inputs and None in spec.shape[1:]):
            shape = ", ".join("N" if side is None else str(side) for side in spec.shape)
            raise EngineError(
                f"the engine's {spec.name!r} has the shape [{shape}]",
                "the first axis must be the batch, in all tensors",
            )


def _batches(engine: Any, spec: TensorSpec) -> tuple[int, int]:
    """The smallest and the largest number of images of an input."""
    fixed = spec.shape[0]
    if fixed is not None:
        return fixed, fixed
    smallest, _, largest = engine.get_tensor_profile_shape(spec.name, PROFILE)
    return int(smallest[0]), int(largest[0])


def _specs(trt: ModuleType, engine: Any, *, inputs: bool) -> tuple[TensorSpec, ...]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(
        spec_of(name, engine.get_tensor_shape(name), engine.get_tensor_dtype(name))
        for name in names
        if (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT) == inputs
    )
