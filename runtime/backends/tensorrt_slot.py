"""The place of one batch on the GPU: how it is copied there, computed and copied back, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cuda.driver import CudaDriver
from ..cuda.interchange import DeviceArray
from ..cuda.memory import Buffer, Streams
from ..errors import DeviceError, DeviceLostError, EngineError
from ..specs import TensorSpec
from .tensorrt_engine import LoadedEngine, shape_of, shape_refused
from .tensorrt_log import recorded

__all__ = ["Images", "Slot", "Source"]


class Kernel(Protocol):
    """`PreprocessKernel`, as it is used here."""

    def enqueue(self, images: Sequence[NDArray[np.uint8]], target: int, stream: int) -> None:
        """Preprocesses the images into the memory at `target`, in the stream."""


@dataclass(frozen=True)
class Images:
    """Decoded images `[H, W, C]`, and the kernel that makes the network's input of them."""

    kernel: Kernel
    images: Sequence[NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> Images:
        return Images(self.kernel, self.images[part])


Source = NDArray[Any] | DeviceArray | Images
"""What an input is filled with; its length is the number of images, and a slice of it is some of them."""


class Slot:
    """A context, a buffer for each tensor at the largest batch, marks in the streams, and a CUDA graph.

    * busy: whether a batch was started and not finished: it may still be in the streams

    A batch is `start`ed and then `finish`ed. Copies to the device go through one stream, the rest through another, so
    that one slot's copy overlaps what another computes. `owner` gets all that must be freed.

    The second run in a row of the same batch size is captured as a graph and those behind it launch it: the first
    lets TensorRT set itself up for the shape, which cannot be captured. A graph has addresses and shapes baked in: the
    addresses here never change, for another batch size it is captured anew.
    """

    def __init__(self, loaded: LoadedEngine, streams: Streams, owner: ExitStack) -> None:
        self._loaded = loaded
        self._driver: CudaDriver = loaded.driver
        self._streams = streams
        self._images = 0  # of the batch that was started last
        self.busy = False
        self._batch = 0  # what the context is set to
        self._graph = 0
        self._warm = False  # whether it has run with this batch
        self._captures = loaded.captures
        self._context: Any = loaded.create_context()
        owner.callback(self._forget)
        owner.callback(self._drop_graph)
        self._given = self._event(owner)  # in the stream of somebody who gave an input
        self._copying, self._copied, self._computing, self._computed, self._done = (
            self._event(owner) for _ in range(5)
        )
        self._set_shapes(loaded.largest_batch)
        self._buffers = {spec.name: self._buffer(spec, owner) for spec in (*loaded.inputs, *loaded.outputs)}
        self._results: dict[str, NDArray[Any]] = {}

    def start(self, feeds: Mapping[str, Source]) -> None:
        """Puts a batch into the streams; one below the engine's smallest is filled up with zeros.

        Raises `DeviceError`, `EngineError`.
        """
        self.settle()
        self.busy = True
        self._images = len(next(iter(feeds.values())))
        batch = max(self._images, self._loaded.smallest_batch)
        self._copy_in(feeds, batch)
        self._prepare(batch)
        self._driver.record(self._computing, self._streams.compute)
        self._compute()
        self._driver.record(self._computed, self._streams.compute)
        for name, array in self._results.items():
            self._buffers[name].download(array.nbytes, self._streams.compute)
        self._driver.record(self._done, self._streams.compute)

    def finish(self) -> dict[str, NDArray[np.float32]]:
        """Waits for the batch; its outputs as new arrays."""
        self._driver.synchronize_event(self._done)
        self.busy = False
        return {name: array[: self._images].astype(np.float32) for name, array in self._results.items()}

    def settle(self) -> None:
        """Waits for a batch that failed half-way: nothing of it may use the memory any more."""
        if self.busy:
            self._driver.synchronize_event(self._given)
            self._streams.synchronize()
            self._batch = 0
            self.busy = False

    def times(self) -> dict[str, float]:
        """Of the batch that was finished last, in milliseconds."""
        elapsed = self._driver.elapsed
        return {
            "copy_in_ms": elapsed(self._copying, self._copied),
            "compute_ms": elapsed(self._computing, self._computed),
            "copy_out_ms": elapsed(self._computed, self._done),
        }

    def _copy_in(self, feeds: Mapping[str, Source], batch: int) -> None:
        stream = self._streams.copy
        for source in feeds.values():
            if isinstance(source, DeviceArray) and source.stream is not None:
                self._driver.record(self._given, source.stream)
                self._driver.wait(stream, self._given)
        self._driver.record(self._copying, stream)
        for name, source in feeds.items():
            buffer = self._buffers[name]
            if isinstance(source, Images):
                source.kernel.enqueue(source.images, buffer.address, stream)
            else:
                buffer.upload(source, stream)
            buffer.clear(self._images, batch, stream)
        self._driver.record(self._copied, stream)
        self._driver.wait(self._streams.compute, self._copied)

    def _prepare(self, batch: int) -> None:
        """Shapes and graph, before the time of the computation begins."""
        if batch != self._batch:
            self._reshape(batch)
        if not self._graph and self._warm and self._captures:
            self._graph = self._captured()

    def _compute(self) -> None:
        if self._graph:
            self._driver.launch_graph(self._graph, self._streams.compute)
        else:
            self._execute()
            self._warm = True

    def _reshape(self, batch: int) -> None:
        self._batch, self._warm = 0, False
        self._drop_graph()
        self._set_shapes(batch)
        self._results = {
            spec.name: self._buffers[spec.name].view(tuple(self._context.get_tensor_shape(spec.name)))
            for spec in self._loaded.outputs
        }
        self._batch = batch

    def _set_shapes(self, batch: int) -> None:
        for spec in self._loaded.inputs:
            shape = shape_of(spec, batch)
            if not self._context.set_input_shape(spec.name, shape):
                raise shape_refused(spec, shape)

    def _execute(self) -> None:
        with recorded(self._loaded.trt) as log:
            if not self._context.execute_async_v3(self._streams.compute):
                raise DeviceError(f"the engine did not run: {log.cause() or 'TensorRT gives no reason'}")

    def _captured(self) -> int:
        """The run as a graph; 0 where it cannot be captured, and then it is not tried again."""
        try:
            return self._driver.captured(self._streams.compute, self._execute)
        except DeviceLostError:
            raise
        except DeviceError:
            self._captures = False
            return 0

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, 0
        if graph:
            self._driver.destroy_graph(graph)

    def _forget(self) -> None:
        self._context = None

    def _event(self, owner: ExitStack) -> int:
        event = self._driver.create_event()
        owner.callback(self._driver.destroy_event, event)
        return event

    def _buffer(self, spec: TensorSpec, owner: ExitStack) -> Buffer:
        """For the shapes that are set; that of an output follows from those of the inputs."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) < 0:
            raise EngineError(f"the shape of {spec.name!r} depends on its values", "only the batch may vary")
        if shape[0] != self._loaded.largest_batch:
            raise EngineError(
                f"{spec.name!r} has the shape {list(shape)} for {self._loaded.largest_batch} images",
                "its first axis must be the batch",
            )
        buffer = Buffer(self._driver, shape, spec.dtype, owner)
        if not self._context.set_tensor_address(spec.name, buffer.address):
            raise EngineError(f"the engine refused the memory of {spec.name!r}")
        return buffer
