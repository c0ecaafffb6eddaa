"""Each call of CUDA's driver fails in turn, on the host-memory driver, a fake: nothing leaks, nothing is misused.

What the sweep finds it must be able to find: at the end stand runners with faults, planted, that it catches.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.runtime.backends.tensorrt_runner import TensorRtRunner
from edgewright.runtime.backends.tensorrt_slot import Slot
from edgewright.runtime.cuda.cuda_python import CudaPython
from edgewright.runtime.cuda.memory import Streams
from edgewright.runtime.errors import DeviceError, DeviceLostError
from gpu_tensors import DlpackTensor, InterfaceTensor, lent
from host_cuda import HostCuda
from stand_in_runs import DRIVERS, images, opened, reference, stand_in
from stand_in_tensorrt import StandInTensorRt
from tensorrt_graphs import serialized

pytestmark = pytest.mark.host_cuda

OUT_OF_MEMORY, INVALID_HANDLE, ILLEGAL_ADDRESS = 2, 400, 700
MOST_CALLS = 400  # a scenario has fewer
Scenario = Callable[[StandInTensorRt, str, Any], None]


@contextmanager
def closed_for_sure(runner: TensorRtRunner) -> Iterator[TensorRtRunner]:
    """As `with runner`, and once more where closing could not begin."""
    try:
        yield runner
    finally:
        try:
            runner.close()
        finally:
            runner.close()


def check(found: dict[str, Any], batch: Any) -> None:
    np.testing.assert_allclose(found["y"], reference(batch), rtol=1e-5, atol=1e-6)


# --- the scenarios -----------------------------------------------------------------------------------------------


def one_after_the_other(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner:
        for count in (4, 4, 4):
            check(runner.infer({"x": images(count)}), images(count))


def changing_shapes(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner:
        for count in (4, 4, 3, 3, 1, 17):
            check(runner.infer({"x": images(count)}), images(count))


def two_in_flight(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner:
        runner.submit({"x": images(4)})
        for seed in range(1, 4):
            runner.submit({"x": images(4, seed)})
            check(runner.result(), images(4, seed - 1))
        check(runner.result(), images(4, 3))


def closed_in_flight(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner:
        runner.submit({"x": images(4)})
        runner.submit({"x": images(9)})


def shared(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner, closed_for_sure(runner.sibling()) as other:
        check(runner.infer({"x": images(4)}), images(4))
        check(other.infer({"x": images(5)}), images(5))


def data_on_the_gpu(trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    with closed_for_sure(opened(trt, driver)) as runner:
        check(runner.infer({"x": tensor}), images(4))
        runner.submit({"x": tensor})
        check(runner.result(), images(4))


SCENARIOS: tuple[tuple[Scenario, Any, bool], ...] = (  # and the kind of tensor, and whether the GPU is integrated
    (one_after_the_other, None, False),
    (one_after_the_other, None, True),
    (changing_shapes, None, False),
    (two_in_flight, None, False),
    (two_in_flight, None, True),
    (closed_in_flight, None, False),
    (shared, None, False),
    (data_on_the_gpu, DlpackTensor, False),
    (data_on_the_gpu, InterfaceTensor, False),
)


# --- the sweep ---------------------------------------------------------------------------------------------------


def swept(cuda: HostCuda, scenario: Scenario, kind: Any, driver: str, code: int, *, integrated: bool = False) -> int:
    """Runs the scenario with its first, second, … call failing, until none fails; as many as failed."""
    trt = stand_in()
    for number in range(1, MOST_CALLS):
        cuda.reset()
        cuda.set_device(integrated=integrated)
        trt.problems.clear()
        with lent(kind, images(4)) as tensor:
            before = cuda.total_calls()
            cuda.fail_call(number, code)
            run(scenario, trt, driver, tensor)
            reached = cuda.total_calls() - before >= number
            cuda.fail_call(0, 0)
        try:
            cuda.assert_clean()
            assert not any(trt.live.values()), trt.live
            # where the context cannot be made current, TensorRT's objects are freed without
            assert [text for text in trt.problems if "is freed without a current context" not in text] == []
        except AssertionError as error:
            raise AssertionError(f"call {number} of {scenario.__name__}: {error}") from None
        if not reached:
            return number - 1
    raise AssertionError(f"{scenario.__name__} takes {MOST_CALLS} calls and more")


def run(scenario: Scenario, trt: StandInTensorRt, driver: str, tensor: Any) -> None:
    """The scenario gives what it should, or one of our errors."""
    with suppress(DeviceError):
        scenario(trt, driver, tensor)


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_leaks_whichever_call_fails(host_cuda: HostCuda, driver: str) -> None:
    cases = [
        swept(host_cuda, scenario, kind, driver, (OUT_OF_MEMORY, INVALID_HANDLE)[index % 2], integrated=integrated)
        for index, (scenario, kind, integrated) in enumerate(SCENARIOS)
    ]
    assert min(cases) >= 30, cases
    assert sum(cases) >= 600, cases


# --- memory stays flat -------------------------------------------------------------------------------------------

WARM_UP, INFERENCES = 2_000, 100_000
MOST_GROWTH = 4 << 20  # bytes; a leak of 50 bytes a run is 5 MB


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check_flat(cuda: HostCuda, runner: TensorRtRunner, inferences: int) -> None:
    """As many inferences, in shapes that change now and then, leave neither objects on the device nor memory."""

    def infer(count: int) -> None:
        for turn in range(count):
            runner.infer({"x": batches[turn // 500 % 2]})

    batches = [np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)]
    infer(WARM_UP)
    objects, memory = cuda.live(), resident()
    infer(inferences)
    assert cuda.live() <= objects + 1, "objects of the driver are left"  # a graph, as it happens
    assert resident() - memory < MOST_GROWTH, f"{(resident() - memory) / inferences:.0f} bytes a run are left"


@pytest.fixture
def small(host_cuda: HostCuda) -> Iterator[TensorRtRunner]:
    """A network that takes no time."""
    content = serialized("[y] y = Add (x, b)", {"b": np.ones(4, np.float32)}, "float[N, 4] x", "float[N, 4] y")
    with opened(stand_in(), engine=content) as runner:
        yield runner


def test_a_hundred_thousand_inferences_keep_memory_flat(host_cuda: HostCuda, small: TensorRtRunner) -> None:
    check_flat(host_cuda, small, INFERENCES)
    assert small.counters.batches == WARM_UP + INFERENCES


def test_a_leak_on_the_device_is_noticed(
    host_cuda: HostCuda, small: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, left = Slot.finish, list[int]()

    def leaking(self: Slot) -> Any:
        left.append(self._driver.create_event())
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "finish", leaking)
        with pytest.raises(AssertionError, match="objects of the driver are left"):
            check_flat(host_cuda, small, 1_000)
    with small._device() as loaded:
        for event in left:
            loaded.driver.destroy_event(event)


def test_a_leak_on_the_host_is_noticed(
    host_cuda: HostCuda, small: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, left = Slot.finish, list[Any]()

    def leaking(self: Slot) -> Any:
        left.append(np.ones(2_000))
        return finish(self)

    monkeypatch.setattr(Slot, "finish", leaking)
    with pytest.raises(AssertionError, match="bytes a run are left"):
        check_flat(host_cuda, small, 1_000)


# --- the sweep finds what it looks for ---------------------------------------------------------------------------


def test_a_buffer_that_is_not_freed_is_found(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaPython, "free_pinned", lambda self, memory: None)
    with pytest.raises(AssertionError, match=r"call 1[0-9] of one_after_the_other: .*still alive"):
        swept(host_cuda, one_after_the_other, None, "cuda-python", OUT_OF_MEMORY)
    host_cuda.reset()


def test_memory_that_is_freed_in_use_is_found(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "synchronize", lambda self: None)
    with pytest.raises(AssertionError, match=r"of one_after_the_other: misuse .*work is queued in it"):
        swept(host_cuda, one_after_the_other, None, "cuda-python", OUT_OF_MEMORY)
    host_cuda.reset()


def test_a_copy_that_nobody_waits_for_is_found(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaPython, "wait", lambda self, stream, event: None)
    with pytest.raises(DeviceError, match="cuEventElapsedTime failed: device not ready"):
        one_after_the_other(stand_in(), "cuda-python", None)
    monkeypatch.setattr(Slot, "times", lambda self: {})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        one_after_the_other(stand_in(), "cuda-python", None)
    host_cuda.reset()


def test_a_graph_of_another_shape_is_found(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "_drop_graph", lambda self: None)
    trt = stand_in()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        changing_shapes(trt, "cuda-python", None)
    assert any(text.startswith("ran for {'x': (4, 16, 8, 8)}, but the context is set to") for text in trt.problems)
    host_cuda.reset()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_device_that_is_lost_at_any_call_is_said_so(host_cuda: HostCuda, driver: str) -> None:
    trt, said = stand_in(), 0
    for number in range(12, 90, 4):  # the first are about the device, without a context on it
        host_cuda.reset()
        host_cuda.fail_call(number, ILLEGAL_ADDRESS)
        try:
            one_after_the_other(trt, driver, None)
        except DeviceLostError:
            said += 1
        assert not any(trt.live.values()), (number, trt.live)
        assert not [text for text in host_cuda.misuse if "destroyed" in text]
    assert said >= 14  # of 20; pycuda keeps to itself what fails while it frees
    host_cuda.reset()
