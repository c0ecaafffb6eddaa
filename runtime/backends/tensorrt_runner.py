"""Runs engines of TensorRT and TensorRT-RTX on a GPU: batches of any size, two of them at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..cuda.interchange import DeviceArray, exchanged
from ..cuda.memory import Streams
from ..errors import ClosedError, DeviceError, DeviceLostError, EngineError, InputError
from ..preprocess import Preprocess
from ..specs import TensorSpec
from .runner import Outputs, Runner, check_fits
from .tensorrt_engine import LoadedEngine
from .tensorrt_slot import Images, Kernel, Slot, Source

__all__ = ["TensorRtRunner"]


@dataclass
class Batch:
    """What was submitted: where it runs, and the parts that are not finished yet."""

    slot: Slot
    parts: deque[dict[str, Source]]


@dataclass
class Failed:
    """What could not begin, and why."""

    error: Exception


class TensorRtRunner(Runner):
    """An engine on streams and in memory of its own; a second slot is made when two batches are first in flight."""

    def __init__(self, loaded: LoadedEngine) -> None:
        """Takes over `loaded`, also where it raises."""
        super().__init__(loaded.inputs, loaded.outputs)
        self._loaded: LoadedEngine | None = loaded
        self._memory = ExitStack()
        self._idle: list[Slot] = []
        self._kernel: Kernel | None = None
        self._lost = False
        with ExitStack() as failing:
            failing.callback(self.close_impl)
            with self._device():
                self._streams = Streams(loaded.driver, self._memory)
                self._idle.append(self._new_slot(loaded))
            failing.pop_all()

    def infer_impl(self, feeds: Mapping[str, Any]) -> Outputs:
        """As many runs as the profile's largest batch needs. Raises `DeviceError` if the GPU fails."""
        return self.result_impl(self.submit_impl(feeds))

    def run_impl(self, feeds: Mapping[str, Any]) -> Outputs:
        """`infer_impl`, which counts by the marks in the streams."""
        return self.infer_impl(feeds)

    def submit_impl(self, feeds: Mapping[str, Any]) -> Batch | Failed:
        """Puts the first part into the streams."""
        slot: Slot | None = None
        try:
            with self._device() as loaded:
                parts = deque(_parts(feeds, loaded.largest_batch))
                slot = self._idle.pop() if self._idle else self._new_slot(loaded)
                slot.start(parts[0])
            return Batch(slot, parts)
        except BaseException as error:
            self._put_back(slot)
            if not isinstance(error, Exception):
                raise
            return Failed(error)

    def result_impl(self, begun: Batch | Failed) -> Outputs:
        """Finishes the first part, and runs those behind it one after the other in the same slot."""
        try:
            return self._failure(begun) if isinstance(begun, Failed) else self._outputs(begun)
        except DeviceError as error:
            if self._lost and not isinstance(error, DeviceLostError):  # TensorRT says only that it did not run
                raise self._loss() from error
            raise

    def preprocess_on_device(self, preprocess: Preprocess) -> None:
        """Compiles the kernel. Raises `EngineError` if the engine's input is not what `preprocess` yields."""
        from ..cuda.resize_kernel import PreprocessKernel

        with self._lock:
            self._check_idle()
            taken = [(spec.shape[1:], spec.dtype) for spec in self.inputs]
            if taken != [(preprocess.input_shape, "float32")]:
                raise EngineError(
                    f"preprocessing gives float32 images of shape {preprocess.input_shape}, the engine takes {taken}",
                    "leave out device_preprocessing",
                )
            with self._device() as loaded:
                kernel = PreprocessKernel(loaded.driver, preprocess, loaded.largest_batch)
                self._memory.callback(kernel.close)
                self._memory.callback(self._streams.synchronize)
                self._kernel = kernel

    def infer_images(self, images: list[NDArray[np.uint8]]) -> Outputs:
        """Outputs for decoded images `[H, W, C]`, which the device preprocesses."""
        if self._kernel is None:
            return super().infer_images(images)
        if not images:
            raise InputError("there are no images", "give one or more")
        with self._lock:
            self._check_idle()
            return self.run_impl({self.inputs[0].name: Images(self._kernel, images)})

    def device_input(self, spec: TensorSpec, given: Any) -> Any:
        """What lies on the GPU stays there; it is copied behind what its producer has still to do."""
        array = exchanged(spec.name, given, self._streams.copy)
        if isinstance(array, DeviceArray):
            try:
                check_fits(spec, array.shape, array.dtype)
            except InputError:
                array.release()
                raise
        return array

    def checked(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """All inputs must have the same number of images, too."""
        inputs = super().checked(feeds)
        counts = {name: len(given) for name, given in inputs.items()}
        if len(set(counts.values())) > 1:
            given = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
            raise InputError(f"the inputs differ in their number of images: {given}", "give the same number in each")
        return inputs

    def sibling_impl(self) -> TensorRtRunner:
        """Streams, memory and contexts of its own, over the same deserialized engine."""
        return TensorRtRunner(self._usable().acquire())

    def close_impl(self) -> None:
        """Memory and contexts, then the engine if nobody else runs it; goes on where one cannot be freed."""
        loaded = self._loaded
        if loaded is None:
            return
        lost = self._lost  # then only the end of the process frees what is on the device
        current = nullcontext() if lost else loaded.driver.current()  # where this fails, close again
        with suppress(*[DeviceError] if lost else []), ExitStack() as behind, current:
            self._loaded = None
            self._idle.clear()
            behind.callback(loaded.release)
            self._memory.close()

    @contextmanager
    def _device(self) -> Iterator[LoadedEngine]:
        """Makes the device's context current, which all calls need, TensorRT's too."""
        loaded = self._usable()
        try:
            with loaded.driver.current():
                yield loaded
        except DeviceLostError:
            self._lost = True
            raise

    def _usable(self) -> LoadedEngine:
        if self._lost:
            raise self._loss()
        if self._loaded is None:
            raise ClosedError("the engine is closed", "open it again")
        return self._loaded

    def _loss(self) -> DeviceLostError:
        return DeviceLostError(
            "the device is lost to this process", "close the session, and open it again in a new process"
        )

    def _new_slot(self, loaded: LoadedEngine) -> Slot:
        with ExitStack() as owner:
            slot = Slot(loaded, self._streams, owner)
            self._memory.enter_context(owner.pop_all())
            self._memory.callback(self._streams.synchronize)  # nothing is freed while work is queued
            return slot

    def _put_back(self, slot: Slot | None) -> None:
        """Once nothing of a batch that failed half-way uses its inputs, some of which are not ours."""
        if slot is None:
            return
        if slot.busy:
            with suppress(DeviceError), self._device():
                slot.settle()
        self._idle.append(slot)

    def _failure(self, failed: Failed) -> NoReturn:
        try:
            raise failed.error
        finally:
            del failed.error  # its traceback leads back here: a cycle that would keep the inputs alive

    def _outputs(self, batch: Batch) -> Outputs:
        try:
            with self._device():
                parts = list(self._finished(batch))
        finally:
            self._put_back(batch.slot)
        if len(parts) == 1:
            return parts[0]
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self.outputs}

    def _finished(self, batch: Batch) -> Iterator[Outputs]:
        """The outputs of one part after the other; counts them as one batch."""
        times: Counter[str] = Counter()
        images = 0
        while batch.parts:
            yield batch.slot.finish()
            times.update(batch.slot.times())
            images += len(next(iter(batch.parts.popleft().values())))
            if batch.parts:
                batch.slot.start(batch.parts[0])
        self.count(images, **times)


def _parts(feeds: Mapping[str, Source], largest: int) -> Iterator[dict[str, Source]]:
    """The batch in pieces of at most `largest` images."""
    images = len(next(iter(feeds.values())))
    for start in range(0, images, largest):
        yield {name: source[start : start + largest] for name, source in feeds.items()}
