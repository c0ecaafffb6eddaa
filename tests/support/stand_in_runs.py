"""Runners on the stand-in for TensorRT and the host-memory CUDA driver, and what onnxruntime gives on its own."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.runtime.backends.tensorrt_engine import LoadedEngine
from edgewright.runtime.backends.tensorrt_runner import TensorRtRunner
from edgewright.runtime.cuda import open_driver
from stand_in_tensorrt import StandInTensorRt
from tensorrt_graphs import graph, normal

__all__ = [
    "DRIVERS",
    "GRAPH",
    "LARGEST",
    "SMALLEST",
    "failures_in_threads",
    "images",
    "opened",
    "reference",
    "stand_in",
]

SMALLEST, LARGEST = 2, 8
GRAPH = graph("fp32")
PYCUDA_MISSING = importlib.util.find_spec("pycuda") is None
DRIVERS = [
    "cuda-python",
    pytest.param("pycuda", marks=pytest.mark.skipif(PYCUDA_MISSING, reason="the wheel of pycuda is not built here")),
]
Array = NDArray[Any]


def stand_in(release: str = "10.3", **options: Any) -> StandInTensorRt:
    """The package of one release, on the fake driver of this process."""
    return StandInTensorRt(ctypes.CDLL("libcuda.so.1"), release, (SMALLEST, 4, LARGEST), **options)


def opened(
    trt: StandInTensorRt,
    driver: str = "cuda-python",
    engine: bytes = GRAPH,
    *,
    captures: bool = True,
    kernels: Path | None = None,
) -> TensorRtRunner:
    """A runner, to be closed; `captures=False` takes from the driver that it can capture CUDA graphs."""
    package: Any = trt
    opened_driver: Any = open_driver(driver)
    opened_driver.captures = opened_driver.captures and captures
    return TensorRtRunner(LoadedEngine(package, engine, opened_driver, kernels))


def failures_in_threads(work: Callable[[int], None], count: int = 8) -> list[BaseException]:
    """What `work` raised; it is called with 0, 1, … in as many threads at the same time."""
    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@functools.cache
def images(count: int, seed: int = 0) -> Array:
    """Float32 `[count, 16, 8, 8]`; not to be changed."""
    return normal(f"images {seed}", count, 16, 8, 8)


def reference(batch: Array) -> Array:
    """What onnxruntime gives for `GRAPH`, float32 `[N, 8]`."""
    result: Array = _session().run(None, {"x": batch})[0]
    return result


@functools.cache
def _session() -> Any:
    return onnxruntime.InferenceSession(GRAPH, providers=["CPUExecutionProvider"])
