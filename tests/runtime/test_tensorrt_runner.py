"""The TensorRT runner on the host-memory CUDA driver, a fake, with a stand-in for NVIDIA's package that computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgewright.runtime.backends.runner import Counters
from edgewright.runtime.backends.tensorrt_engine import LoadedEngine
from edgewright.runtime.backends.tensorrt_runner import TensorRtRunner
from edgewright.runtime.backends.tensorrt_slot import Slot
from edgewright.runtime.cuda import open_driver
from edgewright.runtime.cuda.cuda_python import CudaPython
from edgewright.runtime.errors import (
    ClosedError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    EngineError,
    InputError,
)
from edgewright.runtime.specs import TensorSpec
from gpu_tensors import DefaultStreamTensor, DlpackTensor, InterfaceTensor, lent
from host_cuda import HostCuda
from stand_in_runs import DRIVERS, GRAPH, LARGEST, SMALLEST, failures_in_threads, images, opened, reference, stand_in
from stand_in_tensorrt import StandInTensorRt
from tensorrt_graphs import graph, half_arrays, serialized

pytestmark = pytest.mark.host_cuda

ILLEGAL_ADDRESS, OUT_OF_MEMORY = 700, 2


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The name of the package behind the driver."""
    return str(request.param)


@pytest.fixture
def trt(host_cuda: HostCuda) -> Iterator[StandInTensorRt]:
    made = stand_in()
    yield made
    assert made.problems == []
    assert not any(made.live.values()), made.live


@pytest.fixture
def runner(trt: StandInTensorRt, driver: str) -> Iterator[TensorRtRunner]:
    with opened(trt, driver) as made:
        yield made


def check(runner: TensorRtRunner, *batches: int) -> None:
    for batch in batches:
        found = runner.infer({"x": images(batch)})["y"]
        np.testing.assert_allclose(found, reference(images(batch)), rtol=1e-5, atol=1e-6)
        assert found.dtype == np.float32


# --- results -----------------------------------------------------------------------------------------------------


def test_an_engine_says_what_it_takes(runner: TensorRtRunner) -> None:
    assert runner.inputs == (TensorSpec("x", (None, 16, 8, 8), "float32"),)
    assert runner.outputs == (TensorSpec("y", (None, 8), "float32"),)


@pytest.mark.parametrize("release", ["10.13", "10.16", "11.4"])
def test_every_release_runs_the_same(host_cuda: HostCuda, release: str) -> None:
    trt = stand_in(release)
    with opened(trt) as runner:
        check(runner, 4, 4, 4, 9, 1)
    assert trt.problems == []


@pytest.mark.parametrize("batches", [(4,), (8, 3, 8), (2, 2, 2, 2), (1,), (9, 19, 16), (3, 3, 1, 2, 20, 8, 8, 8)])
def test_any_batch_gives_what_onnxruntime_gives(runner: TensorRtRunner, batches: tuple[int, ...]) -> None:
    check(runner, *batches)  # the profile takes 2 to 8: others are split and filled up


def test_results_belong_to_the_caller(runner: TensorRtRunner) -> None:
    first = runner.infer({"x": images(4)})["y"]
    kept = first.copy()
    runner.infer({"x": -images(4)})
    np.testing.assert_array_equal(first, kept)


def test_half_precision_inputs_and_outputs_stay_as_they_are(trt: StandInTensorRt, driver: str) -> None:
    content = serialized("[out] y = Add (x, d)", {"d": half_arrays()["d"]}, "float16[N, 8] x", "float16[N, 8] y")
    given = images(3)[:, :8, 0, 0].astype(np.float16)
    with opened(trt, driver, content) as runner:
        found = runner.infer({"x": given})["y"]
    wanted = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": given})[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_a_fixed_batch_is_filled_up_and_split(trt: StandInTensorRt, driver: str) -> None:
    content = graph("fp32", inputs="float[3, 16, 8, 8] x", outputs="float[3, 8] y")
    with opened(trt, driver, content) as runner:
        found = runner.infer({"x": images(3)})["y"]
        np.testing.assert_allclose(found, reference(images(3)), rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match=r"expected \[3, 16, 8, 8\]"):
            runner.infer({"x": images(4)})


def two_inputs(second: str) -> bytes:
    return serialized("[add] y = Add (a, b)", {}, f"float[N, 4] a, float{second} b", "float[N, 4] y")


def test_several_inputs_are_split_alike(trt: StandInTensorRt, driver: str) -> None:
    first, second = (images(19, seed)[:, :4, 0, 0] for seed in range(2))
    with opened(trt, driver, two_inputs("[N, 4]")) as runner:
        np.testing.assert_array_equal(runner.infer({"a": first, "b": second})["y"], first + second)
        for call in (runner.infer, runner.submit):
            with pytest.raises(InputError, match="differ in their number of images: 'a' has 19, 'b' has 18; give"):
                call({"a": first, "b": second[1:]})
        np.testing.assert_array_equal(runner.infer({"a": first, "b": second})["y"], first + second)


UNFIT = {
    "a fixed input": (two_inputs("[1, 4]"), r"'b' has the shape \[1, 4\]; the first axis must be the batch"),
    "a number": (two_inputs("[]"), r"'b' has the shape \[\]; the first axis must be the batch"),
    "another dynamic axis": (
        serialized("[y] y = Abs (x)", {}, "float[N, W] x", "float[N, W] y"),
        r"'x' has the shape \[N, N\]; the first axis must be the batch",
    ),
    "an output of another length": (
        serialized("[y] y = Reshape (x, s)", {"s": np.array([-1, 2])}, "float[N, 4] x", "float[M, 2] y"),
        rf"'y' has the shape \[{2 * LARGEST}, 2\] for {LARGEST} images; its first axis must be the batch",
    ),
    "an output that depends on values": (
        serialized("[y] y = Compress <axis = 1> (x, c)", {"c": np.array([True])}, "float[N, 4] x", "float[N, M] y"),
        "the shape of 'y' depends on its values",
    ),
    "bfloat16": (
        serialized("[y] y = Cast <to = 16> (x)", {}, "float[N, 4] x", "bfloat16[N, 4] y"),
        "the engine's 'y' is bfloat16, a type that numpy does not have; export the model with float32",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_are_no_batches_are_refused(trt: StandInTensorRt, kind: str) -> None:
    content, message = UNFIT[kind]
    with pytest.raises(EngineError, match=message):
        opened(trt, engine=content)


# --- graphs ------------------------------------------------------------------------------------------------------


def test_a_graph_is_captured_after_the_first_run_of_a_shape(host_cuda: HostCuda, trt: StandInTensorRt) -> None:
    with opened(trt, "cuda-python") as runner:
        for count, captured in enumerate([0, 1, 1, 1], 1):
            check(runner, 4)
            assert host_cuda.calls("cuStreamBeginCapture") == captured, count
        assert host_cuda.calls("cuGraphLaunch") == 3
        assert host_cuda.live("exec") == 1
        check(runner, 8)  # another shape: what was captured goes
        assert host_cuda.live("exec") == 0
        check(runner, 8, 8)
        assert host_cuda.calls("cuStreamBeginCapture") == 2
        assert host_cuda.calls("cuGraphLaunch") == 5
        assert trt.executions == 7


def test_what_cannot_be_captured_runs_without(host_cuda: HostCuda, trt: StandInTensorRt) -> None:
    with opened(trt, "cuda-python") as runner:
        host_cuda.fail_named("cuStreamEndCapture", 901)
        check(runner, 4, 4, 4, 8, 8)
        assert host_cuda.calls("cuStreamBeginCapture") == 1  # and it is not tried again
        assert host_cuda.calls("cuGraphLaunch") == 0


def test_a_driver_without_graphs_runs_without(host_cuda: HostCuda, trt: StandInTensorRt, driver: str) -> None:
    with opened(trt, driver, captures=False) as runner:
        check(runner, 4, 4, 4)
    assert host_cuda.calls("cuStreamBeginCapture") == 0


def test_capturing_is_not_counted_as_computing(
    trt: StandInTensorRt, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(trt) as runner:
        marks: list[tuple[int, int]] = []
        captured = CudaPython.captured

        def noted(self: Any, *arguments: Any) -> int:
            before = host_cuda.calls("cuEventRecord")
            graph = captured(self, *arguments)
            marks.append((before, host_cuda.calls("cuEventRecord")))
            return graph

        check(runner, 4)
        a_batch = host_cuda.calls("cuEventRecord")
        monkeypatch.setattr(CudaPython, "captured", noted)
        check(runner, 4)
        # of the five marks of a batch two are about the copy to the device, three about the rest
        assert marks == [(a_batch + 2, a_batch + 2)]


# --- two in flight -----------------------------------------------------------------------------------------------


def test_double_buffering_gives_the_same_in_order(runner: TensorRtRunner) -> None:
    batches = [images(size, seed) for seed, size in enumerate([4, 4, 4, 8, 1, 19, 4, 4, 2])]
    found: list[Any] = []
    for index, batch in enumerate(batches):
        runner.submit({"x": batch})
        if index:
            found.append(runner.result()["y"])
    found.append(runner.result()["y"])
    for batch, result in zip(batches, found, strict=True):
        np.testing.assert_allclose(result, reference(batch), rtol=1e-5, atol=1e-6)
    assert runner.counters.batches == len(batches)
    assert runner.counters.images == sum(map(len, batches))


def test_the_next_batch_is_copied_before_the_first_is_waited_for(host_cuda: HostCuda, trt: StandInTensorRt) -> None:
    with opened(trt, "cuda-python") as runner:
        runner.submit({"x": images(4)})
        runner.submit({"x": images(8)})
        assert host_cuda.calls("cuMemcpyHtoDAsync") == 2
        assert host_cuda.calls("cuEventSynchronize") == host_cuda.calls("cuStreamSynchronize") == 0
        assert host_cuda.pageable_copies() == 0
        runner.drop()


def test_one_slot_is_enough_until_two_are_in_flight(host_cuda: HostCuda, trt: StandInTensorRt) -> None:
    with opened(trt, "cuda-python") as runner:
        runner.submit({"x": images(4)})
        runner.result()
        check(runner, 4)
        assert trt.live["Context"] == 1
        before = host_cuda.live()
        runner.submit({"x": images(4)})
        runner.submit({"x": images(4)})
        assert trt.live["Context"] == 2
        assert runner.result() is not None
        assert runner.result() is not None
        assert host_cuda.live() > before


def test_an_error_comes_out_of_the_result_of_its_batch(trt: StandInTensorRt, runner: TensorRtRunner) -> None:
    runner.submit({"x": images(4)})
    trt.faults["run"] = True
    runner.submit({"x": images(4, 1)})
    trt.faults.clear()
    np.testing.assert_allclose(runner.result()["y"], reference(images(4)), rtol=1e-5, atol=1e-6)
    with pytest.raises(DeviceError, match="the engine did not run: an illegal memory access was encountered"):
        runner.result()
    check(runner, 4)


def test_an_interrupted_batch_is_waited_for(
    host_cuda: HostCuda, trt: StandInTensorRt, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Slot) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "_compute", interrupted)
        waits = host_cuda.calls("cuStreamSynchronize")
        for call in (runner.submit, runner.infer):
            with pytest.raises(KeyboardInterrupt):
                call({"x": images(4)})
    assert host_cuda.calls("cuStreamSynchronize") == waits + 4  # or the copy might read what its owner has freed
    check(runner, 4, 4, 4)
    assert trt.live["Context"] == 1  # the slot is used again


def test_closing_with_batches_in_flight_frees_all(trt: StandInTensorRt, driver: str) -> None:
    runner = opened(trt, driver)
    runner.submit({"x": images(4)})
    runner.submit({"x": images(19)})
    runner.close()
    with pytest.raises(ClosedError):
        runner.result()


# --- zero-copy ---------------------------------------------------------------------------------------------------


def test_memory_is_shared_on_an_integrated_gpu(host_cuda: HostCuda, trt: StandInTensorRt, driver: str) -> None:
    host_cuda.set_device(integrated=True)
    with opened(trt, driver) as runner:
        check(runner, 4, 4, 4, 1, 19)
        runner.submit({"x": images(4)})
        runner.submit({"x": images(5)})
        np.testing.assert_allclose(runner.result()["y"], reference(images(4)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(runner.result()["y"], reference(images(5)), rtol=1e-5, atol=1e-6)
        assert host_cuda.live("device") == 0
        assert host_cuda.calls("cuMemcpyHtoDAsync") == host_cuda.calls("cuMemcpyDtoHAsync") == 0


# --- what lies on the GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("kind", [DlpackTensor, InterfaceTensor, DefaultStreamTensor])
@pytest.mark.parametrize("batch", [1, 4, 19])
def test_data_on_the_gpu_is_used_there(
    host_cuda: HostCuda, trt: StandInTensorRt, driver: str, kind: Any, batch: int, integrated: bool
) -> None:
    host_cuda.set_device(integrated=integrated)
    with lent(kind, images(batch)) as tensor, opened(trt, driver) as runner:
        uploads = host_cuda.calls("cuMemcpyHtoDAsync")
        found = runner.infer({"x": tensor})["y"]
        filled = batch < SMALLEST and not integrated
        assert host_cuda.calls("cuMemcpyHtoDAsync") - uploads == int(filled)  # zeros, to the smallest batch
        assert host_cuda.calls("cuMemcpyDtoDAsync") == -(-batch // LARGEST)
        np.testing.assert_allclose(found, reference(images(batch)), rtol=1e-5, atol=1e-6)
        runner.submit({"x": tensor})
        runner.submit({"x": images(3)})
        np.testing.assert_allclose(runner.result()["y"], found, rtol=1e-6)
        runner.drop()


STRIDED = np.zeros((4, 8, 8, 16), np.float32).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("kind", "array", "device", "message"),
    [
        *(
            (kind, array, (2, 0), message)
            for kind in (DlpackTensor, InterfaceTensor)
            for array, message in (
                (images(4)[:, :8].copy(), r"has shape \[4, 8, 8, 8\], expected \[N, 16, 8, 8\]"),
                (images(4).astype(np.float16), "is float16, expected float32; convert it with astype"),
                (STRIDED, "is not contiguous on the GPU; make it contiguous first"),
            )
        ),
        (DlpackTensor, images(4), (2, 1), "lies on GPU 1, the engine is on GPU 0; copy it there"),
        (DlpackTensor, images(4), (4, 0), "lies on a device of DLPack's type 4; copy it to the processor"),
    ],
)
def test_what_does_not_fit_on_the_gpu_says_what_to_do(
    trt: StandInTensorRt, driver: str, kind: Any, array: Any, device: tuple[int, int], message: str
) -> None:
    with lent(kind, array) as tensor:
        tensor.device = device
        with opened(trt, driver) as runner, pytest.raises(InputError, match=message):
            runner.infer({"x": tensor})


# --- siblings ----------------------------------------------------------------------------------------------------


def test_siblings_share_the_engine_and_are_closed_on_their_own(trt: StandInTensorRt, driver: str) -> None:
    first = opened(trt, driver)
    second = first.sibling()
    assert trt.live == {"Runtime": 1, "Engine": 1, "Context": 2}
    first.close()
    assert trt.live == {"Runtime": 1, "Engine": 1, "Context": 1}
    check(second, 4, 4, 4)
    third = second.sibling()
    second.close()
    check(third, 4)
    third.close()
    assert not any(trt.live.values())


def test_eight_threads_with_a_sibling_each(trt: StandInTensorRt, driver: str) -> None:
    first = opened(trt, driver)
    runners = [first, *(first.sibling() for _ in range(7))]

    def work(index: int) -> None:
        for turn in range(12):
            batch = images(1 + (index + turn) // 4 % 9, index)
            runners[index].submit({"x": batch})
            np.testing.assert_allclose(runners[index].result()["y"], reference(batch), rtol=1e-5, atol=1e-6)

    failed = failures_in_threads(work)
    for runner in runners:
        runner.close()
    assert failed == []


# --- counters ----------------------------------------------------------------------------------------------------


def test_counters_come_from_the_streams(runner: TensorRtRunner) -> None:
    assert runner.counters == Counters()
    check(runner, 4, 19)
    counters = runner.counters
    assert (counters.batches, counters.images) == (2, 23)
    assert counters.preprocess_ms == 0
    for milliseconds in (counters.copy_in_ms, counters.compute_ms, counters.copy_out_ms):
        assert 0 < milliseconds < 5000


def test_what_the_engine_takes_is_computing_alone(trt: StandInTensorRt, runner: TensorRtRunner) -> None:
    trt.faults["slow"] = 0.05
    check(runner, 4, 17)  # one run, and three
    counters = runner.counters
    assert 200 <= counters.compute_ms < 5000
    assert counters.copy_in_ms + counters.copy_out_ms < 200


# --- errors ------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_and_leaves_nothing(host_cuda: HostCuda, trt: StandInTensorRt, driver: str) -> None:
    host_cuda.set_device(memory=20_000)
    with pytest.raises(DeviceMemoryError, match="take a smaller batch or profile"):
        opened(trt, driver)


def test_too_little_memory_for_a_second_batch_is_said_by_its_result(
    host_cuda: HostCuda, trt: StandInTensorRt, runner: TensorRtRunner
) -> None:
    host_cuda.fail_named("cuMemAlloc", OUT_OF_MEMORY, times=2)  # pycuda tries twice
    before = host_cuda.live()
    runner.submit({"x": images(4)})
    runner.submit({"x": images(4)})
    assert host_cuda.live() == before  # what was taken for the second is given back
    runner.result()
    with pytest.raises(DeviceMemoryError):
        runner.result()
    check(runner, 4)


def test_a_lost_device_can_only_be_closed(host_cuda: HostCuda, trt: StandInTensorRt, driver: str) -> None:
    runner = opened(trt, driver)
    check(runner, 4)
    host_cuda.fail_named("cuEventSynchronize", ILLEGAL_ADDRESS)
    with pytest.raises(DeviceLostError, match="start a new process"):
        runner.infer({"x": images(4)})
    calls = host_cuda.total_calls()
    for call in (lambda: runner.infer({"x": images(4)}), runner.sibling):
        with pytest.raises(
            DeviceLostError, match="the device is lost to this process; close the session, and open it again"
        ):
            call()
    assert host_cuda.total_calls() == calls
    runner.close()
    trt.problems.clear()  # no context can be made current to free TensorRT's objects
    host_cuda.reset()  # as the end of the process does


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("context", "TensorRT cannot prepare the engine: out of memory; it probably needs more memory"),
        ("shape", r"the engine refused the shape \[8, 16, 8, 8\] of 'x'"),
        ("address", "the engine refused the memory of 'x'"),
        ("load", "TensorRT 10.3.0 cannot load the engine: the engine plan file is not compatible; an engine loads"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_and_leaves_nothing(
    host_cuda: HostCuda, trt: StandInTensorRt, driver: str, fault: str, message: str
) -> None:
    trt.faults[fault] = True
    with pytest.raises(EngineError, match=message):
        opened(trt, driver)


def test_an_engine_that_is_none_is_refused(trt: StandInTensorRt, driver: str) -> None:
    for content in (b"", b"no engine", GRAPH[:100]):
        with pytest.raises(EngineError, match="cannot load the engine"):
            opened(trt, driver, content)


def test_after_closing_nothing_is_called(host_cuda: HostCuda, trt: StandInTensorRt, driver: str) -> None:
    runner = opened(trt, driver)
    check(runner, 4)
    runner.close()
    calls = host_cuda.total_calls()
    runner.close()
    for call in (lambda: runner.infer({"x": images(4)}), lambda: runner.submit({"x": images(4)}), runner.sibling):
        with pytest.raises(ClosedError, match="the engine is closed; open it again"):
            call()
    assert host_cuda.total_calls() == calls


@pytest.mark.parametrize(("dla", "core"), [(None, -1), (1, 1)])
def test_an_engine_for_a_dla_is_loaded_on_its_core(
    trt: StandInTensorRt, driver: str, dla: int | None, core: int
) -> None:
    LoadedEngine(trt, GRAPH, open_driver(driver), dla=dla).release()  # type: ignore[arg-type]
    assert trt.cores == [core]


def test_a_loaded_engine_goes_with_its_last_user(trt: StandInTensorRt, driver: str) -> None:
    loaded = LoadedEngine(trt, GRAPH, open_driver(driver))  # type: ignore[arg-type]
    loaded.acquire().release()
    assert trt.live["Engine"] == 1
    loaded.release()
    assert trt.live["Engine"] == 0
