"""A loaded engine: the base class owns the lifecycle, the checks and the counters, a backend fills in the rest."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ClosedError, EngineError, InputError
from ..preprocess import Preprocess
from ..specs import TensorSpec

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["MOST_IN_FLIGHT", "Counters", "Outputs", "Runner", "check_dtypes", "check_fits"]

Outputs = dict[str, NDArray[np.float32]]
RunnerType = TypeVar("RunnerType", bound="Runner")

MOST_IN_FLIGHT = 2
"""Double buffering: one batch is computed while the next is prepared; more would wait without gain."""


@dataclass(frozen=True)
class Counters:
    """What a runner has done so far; the times are sums in milliseconds, and overlap where batches do.

    * preprocess_ms: from images to the network's input, on the processor
    * copy_in_ms, copy_out_ms: between host and device, by TensorRT's backends; others leave them 0, and copying is part
      of compute_ms. Preprocessing on the device is part of copy_in_ms
    * compute_ms: of the engine
    """

    batches: int = 0
    images: int = 0
    preprocess_ms: float = 0.0
    copy_in_ms: float = 0.0
    compute_ms: float = 0.0
    copy_out_ms: float = 0.0


class Runner(ABC):
    """A loaded engine. Use it in a `with`, or close it.

    One thread at a time uses it, another waits; threads that are to run side by side take a `sibling` each.
    """

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._closed = self._freed = False
        self._lock = threading.Lock()
        self._in_flight: deque[Any] = deque()
        self._worker: ThreadPoolExecutor | None = None
        self._batches = self._images = 0
        self._copy_in_ms = self._compute_ms = self._copy_out_ms = 0.0

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return Counters(
            batches=self._batches,
            images=self._images,
            copy_in_ms=self._copy_in_ms,
            compute_ms=self._compute_ms,
            copy_out_ms=self._copy_out_ms,
        )

    def infer(self, feeds: Mapping[str, Any]) -> Outputs:
        """Outputs by name for inputs by name; new arrays, owned by the caller.

        Inputs are numpy arrays, or anything with DLPack or `__cuda_array_interface__`; what lies on the GPU is used
        there, and is refused by an engine on the processor. Raises `InputError` if a name, shape, dtype or device does
        not fit, `ClosedError` if the engine is closed, `EngineError` if batches are in flight.
        """
        with self._lock:
            self._check_idle()
            return self.run_impl(self.checked(feeds))

    def submit(self, feeds: Mapping[str, Any]) -> None:
        """Begins a batch and returns; `result` gives its outputs. At most two are in flight.

        The inputs must stay as they are until then. Raises `InputError` and `ClosedError` as `infer` does, and
        `EngineError` if two batches are in flight; what fails later comes out of `result`.
        """
        with self._lock:
            self._check_open()
            if len(self._in_flight) == MOST_IN_FLIGHT:
                raise EngineError(f"{MOST_IN_FLIGHT} batches are in flight already", "take a result first")
            self._in_flight.append(self.submit_impl(self.checked(feeds)))

    def result(self) -> Outputs:
        """The outputs of the batch that was submitted first of those in flight, or its exception; waits for it.

        Raises `EngineError` if nothing is in flight.
        """
        with self._lock:
            self._check_open()
            if not self._in_flight:
                raise EngineError("nothing is in flight", "submit a batch first")
            return self.result_impl(self._in_flight.popleft())

    def drop(self) -> None:
        """Waits for what is in flight, and forgets it and its errors."""
        with self._lock:
            self._drop()

    def preprocess_on_device(self, preprocess: Preprocess) -> None:
        """Prepares `infer_images`. Raises `EngineError` where the device cannot preprocess."""
        raise EngineError(
            "this engine takes what the processor makes, there is no device to preprocess on",
            "leave out device_preprocessing",
        )

    def infer_images(self, images: list[NDArray[np.uint8]]) -> Outputs:
        """Outputs for decoded images `[H, W, C]` of any sizes, preprocessed on the device.

        Raises `EngineError` unless `preprocess_on_device` was called.
        """
        raise EngineError("preprocessing on the device was not asked for", "open with device_preprocessing=True")

    def sibling(self: RunnerType) -> RunnerType:
        """Another runner over the same loaded engine, for another thread; each is closed on its own."""
        with self._lock:
            self._check_open()
            return self.sibling_impl()

    def close(self) -> None:
        """Drops what is in flight and frees the engine's memory.

        Closing twice does nothing; where it raised, closing again frees what is left.
        """
        with self._lock:
            self._closed = True
            self._drop()
            if self._worker is not None:
                self._worker.shutdown()
            if not self._freed:
                self.close_impl()
                self._freed = True

    def __enter__(self: RunnerType) -> RunnerType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def infer_impl(self, feeds: Mapping[str, Any]) -> Outputs:
        """`infer` with checked, contiguous inputs."""

    @abstractmethod
    def close_impl(self) -> None:
        """Frees what the backend holds; called again, it frees what it could not free before."""

    def sibling_impl(self: RunnerType) -> RunnerType:
        """`sibling` of an open engine."""
        raise EngineError("this engine cannot be shared by several sessions", "open it once for each")

    def run_impl(self, feeds: Mapping[str, Any]) -> Outputs:
        """`infer_impl`, counted; a backend that can tell copying from computing does so itself."""
        begun = perf_counter_ns()
        results = self.infer_impl(feeds)
        self.count(_images_of(feeds), compute_ms=(perf_counter_ns() - begun) / 1e6)
        return results

    def submit_impl(self, feeds: Mapping[str, Any]) -> Any:
        """Begins a batch without raising what goes wrong in it; gives what `result_impl` takes."""
        if self._worker is None:
            from concurrent.futures import ThreadPoolExecutor  # with its logging 10 ms, which few need

            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgewright")
        return self._worker.submit(self.run_impl, feeds)

    def result_impl(self, begun: Any) -> Outputs:
        """The outputs of what `submit_impl` began, or its exception."""
        outputs: Outputs = begun.result()
        return outputs

    def device_input(self, spec: TensorSpec, given: Any) -> Any:
        """What is no numpy array, as one; an engine on a GPU takes what lies there."""
        from ..cuda.interchange import exchanged

        return exchanged(spec.name, given, None)

    def checked(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as they are used. Raises `InputError` if one is missing or does not fit."""
        return {spec.name: self._input(spec, feeds) for spec in self.inputs}

    def count(self, images: int, *, copy_in_ms: float = 0.0, compute_ms: float = 0.0, copy_out_ms: float = 0.0) -> None:
        """Adds one batch to the counters."""
        self._batches += 1
        self._images += images
        self._copy_in_ms += copy_in_ms
        self._compute_ms += compute_ms
        self._copy_out_ms += copy_out_ms

    def _input(self, spec: TensorSpec, feeds: Mapping[str, Any]) -> Any:
        if spec.name not in feeds:
            raise InputError(f"input {spec.name!r} is missing; the engine needs it, given were {sorted(feeds)}")
        given = feeds[spec.name]
        if not isinstance(given, np.ndarray):
            given = self.device_input(spec, given)
        check_fits(spec, given.shape, given.dtype)
        return np.ascontiguousarray(given) if isinstance(given, np.ndarray) else given

    def _check_idle(self) -> None:
        self._check_open()
        if self._in_flight:
            raise EngineError("submitted batches are in flight", "take their results first")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed", "open it again")

    def _drop(self) -> None:
        while self._in_flight:
            try:
                self.result_impl(self._in_flight.popleft())
            except Exception:  # nobody asked for it
                continue


def _images_of(feeds: Mapping[str, Any]) -> int:
    first = next(iter(feeds.values()))
    return first.shape[0] if first.shape else 1


def check_dtypes(specs: Iterable[TensorSpec]) -> None:
    """Raises `EngineError` if numpy lacks the type of a tensor: it could be neither given nor returned."""
    for spec in specs:
        if not _is_numpys(spec.dtype):
            raise EngineError(
                f"the engine's {spec.name!r} is {spec.dtype}, a type that numpy does not have",
                "export the model with float32 or float16 inputs and outputs",
            )


def _is_numpys(name: str) -> bool:
    try:
        return np.dtype(name).kind in "biuf"  # other packages add types, such as bfloat16, of other kinds
    except TypeError:
        return False


def check_fits(spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises `InputError` unless an input may have this shape and dtype."""
    fits = len(shape) == len(spec.shape) and all(
        given == wanted or (wanted is None and given > 0) for wanted, given in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("N" if side is None else str(side) for side in spec.shape)
        raise InputError(f"input {spec.name!r} has shape {list(shape)}, expected [{wanted}]")
    if dtype != np.dtype(spec.dtype):
        raise InputError(f"input {spec.name!r} is {dtype}, expected {spec.dtype}", "convert it with astype")
