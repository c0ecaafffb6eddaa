"""What every runner does: two batches in flight, counters, siblings, and tensors of other libraries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.backends.runner import Counters, Runner
from edgewright.runtime.cuda.interchange import DeviceArray, exchanged
from edgewright.runtime.errors import ClosedError, EngineError, InputError
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import TensorSpec
from tensorrt_graphs import graph, normal, serialized

INPUT, OUTPUT = TensorSpec("x", (None, 3), "float32"), TensorSpec("y", (None, 3), "float32")


class FakeRunner(Runner):
    """Doubles; waits for `gate`, fails for negative numbers, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__((INPUT,), (OUTPUT,))
        self.gate = threading.Event()
        self.gate.set()
        self.given: list[Any] = []
        self.threads: set[int] = set()
        self.freed = 0

    def infer_impl(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert self.gate.wait(10)
        self.given.append(feeds["x"])
        self.threads.add(threading.get_ident())
        if (feeds["x"] < 0).any():
            raise EngineError("a negative number")
        return {"y": 2 * feeds["x"]}

    def close_impl(self) -> None:
        self.freed += 1


def rows(count: int, value: float = 1.0) -> Any:
    return np.full((count, 3), value, np.float32)


# --- submit and result -------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_their_batches() -> None:
    with FakeRunner() as runner:
        runner.submit({"x": rows(1, 1)})
        runner.submit({"x": rows(2, 2)})
        np.testing.assert_array_equal(runner.result()["y"], rows(1, 2))
        runner.submit({"x": rows(3, 3)})
        np.testing.assert_array_equal(runner.result()["y"], rows(2, 4))
        np.testing.assert_array_equal(runner.result()["y"], rows(3, 6))


def test_a_batch_is_computed_while_the_next_is_prepared() -> None:
    with FakeRunner() as runner:
        runner.gate.clear()
        runner.submit({"x": rows(1)})  # returns, though nothing is computed yet
        assert runner.given == []
        runner.gate.set()
        runner.result()
        assert threading.get_ident() not in runner.threads
        runner.infer({"x": rows(1)})
        assert threading.get_ident() in runner.threads


def test_at_most_two_are_in_flight() -> None:
    with FakeRunner() as runner:
        runner.submit({"x": rows(1)})
        runner.submit({"x": rows(1)})
        with pytest.raises(EngineError, match="2 batches are in flight already; take a result first"):
            runner.submit({"x": rows(1)})
        runner.result()
        runner.submit({"x": rows(1)})


def test_without_a_batch_there_is_no_result() -> None:
    with FakeRunner() as runner:
        with pytest.raises(EngineError, match="nothing is in flight; submit a batch first"):
            runner.result()
        runner.submit({"x": rows(1)})
        runner.result()
        with pytest.raises(EngineError, match="nothing is in flight"):
            runner.result()


def test_infer_waits_for_no_submitted_batch() -> None:
    with FakeRunner() as runner:
        runner.submit({"x": rows(1)})
        with pytest.raises(EngineError, match="submitted batches are in flight; take their results first"):
            runner.infer({"x": rows(1)})
        runner.result()
        runner.infer({"x": rows(1)})


def test_an_error_belongs_to_its_batch() -> None:
    with FakeRunner() as runner:
        runner.submit({"x": rows(1, -1)})
        runner.submit({"x": rows(1, 1)})
        with pytest.raises(EngineError, match="a negative number"):
            runner.result()
        np.testing.assert_array_equal(runner.result()["y"], rows(1, 2))


def test_what_does_not_fit_is_refused_at_once_and_is_not_in_flight() -> None:
    with FakeRunner() as runner:
        with pytest.raises(InputError, match="has shape"):
            runner.submit({"x": np.zeros((1, 4), np.float32)})
        with pytest.raises(EngineError, match="nothing is in flight"):
            runner.result()


def test_closing_drops_what_is_in_flight_with_its_errors() -> None:
    runner = FakeRunner()
    runner.submit({"x": rows(1, -1)})
    runner.submit({"x": rows(1)})
    runner.close()
    assert runner.freed == 1
    assert not any(thread.name.startswith("edgewright") for thread in threading.enumerate())
    for call in (runner.result, lambda: runner.submit({"x": rows(1)}), lambda: runner.infer({"x": rows(1)})):
        with pytest.raises(ClosedError, match="the engine is closed; open it again"):
            call()


def test_dropping_leaves_it_open() -> None:
    with FakeRunner() as runner:
        runner.submit({"x": rows(1, -1)})
        runner.drop()
        np.testing.assert_array_equal(runner.infer({"x": rows(1)})["y"], rows(1, 2))


def test_another_thread_waits_its_turn() -> None:
    with FakeRunner() as runner:
        runner.gate.clear()
        waiting = [threading.Thread(target=runner.infer, args=({"x": rows(1)},)) for _ in range(3)]
        for thread in waiting:
            thread.start()
        time.sleep(0.02)
        runner.gate.set()
        for thread in waiting:
            thread.join()
        assert runner.counters.batches == 3


# --- counters ----------------------------------------------------------------------------------------------------


def test_counters_add_up() -> None:
    with FakeRunner() as runner:
        assert runner.counters == Counters()
        before = runner.counters
        runner.infer({"x": rows(3)})
        runner.submit({"x": rows(2)})
        runner.result()
        after = runner.counters
        assert (after.batches, after.images) == (2, 5)
        assert 0 < after.compute_ms < 1000
        assert after.copy_in_ms == after.copy_out_ms == after.preprocess_ms == 0
        assert before == Counters()  # a snapshot
        with pytest.raises(EngineError):
            runner.infer({"x": rows(1, -1)})
        assert runner.counters == after  # what failed is not counted


def test_time_is_counted_in_milliseconds() -> None:
    with FakeRunner() as runner:
        runner.gate.clear()
        threading.Timer(0.05, runner.gate.set).start()
        runner.infer({"x": rows(1)})
        assert 40 < runner.counters.compute_ms < 5000


# --- siblings ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_says_so() -> None:
    with FakeRunner() as runner, pytest.raises(EngineError, match="cannot be shared by several sessions"):
        runner.sibling()
    with pytest.raises(ClosedError):
        runner.sibling()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_siblings_run_side_by_side_and_are_closed_on_their_own(name: str) -> None:
    backend = BACKENDS[name]
    if backend.absence() is not None:
        pytest.skip(f"{name} is not installed")
    content = graph("fp32")
    engine = content if name == "onnxruntime" else backend.build(_request(content)).compiled.engine
    images = normal("images", 4, 16, 8, 8)
    wanted = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]
    first = backend.open(engine, threads=1)
    np.testing.assert_array_equal(first.infer({"x": Lender(images)})["y"], first.infer({"x": images})["y"])
    others = [first.sibling() for _ in range(3)]
    first.close()
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        for batch in (1, 4, 2, 4):
            found[index] = others[index].infer({"x": images[:batch]})["y"]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, other in enumerate(others):
        np.testing.assert_allclose(found[index], wanted, rtol=1e-4, atol=1e-5)
        assert other.counters.batches == 4
        other.close()


def _request(content: bytes) -> Any:
    from edgewright.runtime.backends import BuildRequest

    return BuildRequest(content, "fp32", ())


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "dtype"), [("int64", "int64"), ("uint8", "uint8"), ("double", "float64")])
def test_onnxruntime_takes_the_types_that_numpy_has(word: str, dtype: str) -> None:
    content = serialized("[y] y = Cast <to = 1> (x)", {}, f"{word}[N, 2] x", "float[N, 2] y")
    with BACKENDS["onnxruntime"].open(content) as runner:
        assert runner.inputs == (TensorSpec("x", (None, 2), dtype),)
        given = np.array([[1, 2]], dtype)
        np.testing.assert_array_equal(runner.infer({"x": given})["y"], given.astype(np.float32))
        with pytest.raises(InputError, match=f"'x' is int32, expected {dtype}; convert it"):
            runner.infer({"x": given.astype(np.int32)})


def test_a_type_that_numpy_lacks_is_refused() -> None:
    content = serialized("[y] y = Cast <to = 1> (x)", {}, "bfloat16[N, 2] x", "float[N, 2] y")
    with pytest.raises(EngineError, match="the engine's 'x' is bfloat16, a type that numpy does not have; export"):
        BACKENDS["onnxruntime"].open(content)


# --- preprocessing on the device ---------------------------------------------------------------------------------


def test_the_processor_does_not_preprocess_as_a_device() -> None:
    with FakeRunner() as runner:
        with pytest.raises(EngineError, match="no device to preprocess on; leave out device_preprocessing"):
            runner.preprocess_on_device(Preprocess(8, None, (0.5,) * 3, (0.5,) * 3))
        with pytest.raises(EngineError, match="was not asked for; open with device_preprocessing=True"):
            runner.infer_images([np.zeros((8, 8, 3), np.uint8)])


# --- tensors of other libraries ----------------------------------------------------------------------------------


class Lender:
    """An array of another library, which speaks DLPack, with whatever device it claims."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        assert self.device[0] == 1, "data on a device was read on the processor"
        return self.array.__dlpack__()


def test_dlpack_of_the_processor_is_used_where_it_lies() -> None:
    array = rows(2)
    with FakeRunner() as runner:
        np.testing.assert_array_equal(runner.infer({"x": Lender(array)})["y"], 2 * array)
        assert np.shares_memory(runner.given[0], array)
        runner.infer({"x": array})
        assert runner.given[1] is array


def test_a_torch_tensor_is_taken_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2, 3)
    with FakeRunner() as runner:
        np.testing.assert_array_equal(runner.infer({"x": tensor})["y"], rows(2, 2))
        assert runner.given[0].ctypes.data == tensor.data_ptr()
        unfits = (
            torch.ones(2, 3, requires_grad=True),
            torch.ones(2, 3, dtype=torch.bfloat16),
            torch.ones(2, 3, device="meta"),
        )
        for unfit in unfits:
            with pytest.raises(InputError, match=r"'x' cannot be taken over: .*; give it as a numpy array"):
                runner.infer({"x": unfit})
        with pytest.raises(InputError, match="'x' is float64, expected float32"):
            runner.infer({"x": tensor.double()})


def test_lists_are_arrays_too() -> None:
    with FakeRunner() as runner:
        with pytest.raises(InputError, match="'x' is float64, expected float32; convert it with astype"):
            runner.infer({"x": [[1.0, 2.0, 3.0]]})
        with pytest.raises(InputError, match=r"has shape \[\], expected \[N, 3\]"):
            runner.infer({"x": object()})


class OnGpu:
    """Claims to lie on a GPU, through CUDA's array interface."""

    __cuda_array_interface__: ClassVar = {"shape": (1, 3), "typestr": "<f4", "data": (4096, False), "version": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda: Lender(rows(1), (2, 0)),
            r"'x' lies on the GPU, the engine takes it from the processor; copy it .*\.cpu\(\)",
        ),
        (OnGpu, r"'x' lies on the GPU, the engine takes it from the processor; copy it .*\.cpu\(\)"),
        (lambda: Lender(rows(1), (10, 0)), "'x' lies on a device of DLPack's type 10; copy it to the processor"),
        (lambda: Lender(rows(1)[:, :2]), r"has shape \[1, 2\], expected \[N, 3\]"),
        (lambda: Lender(rows(1).astype(np.float16)), "'x' is float16, expected float32"),
    ],
)
def test_what_does_not_fit_says_what_to_do(given: Callable[[], Any], message: str) -> None:
    with FakeRunner() as runner, pytest.raises(InputError, match=message):
        runner.infer({"x": given()})


@dataclass
class Interface:
    """Claims to lie on a GPU, in a layout."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    mask: object = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"typestr": "<f4", "data": (4096, False), "version": 3, **vars(self)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Interface((2, 3), None), ""),
        (Interface((2, 3), (12, 4)), ""),
        (Interface((1, 3), (999, 4)), ""),  # the stride of an axis of length 1 means nothing
        (Interface((2, 3), (24, 4)), "is not contiguous"),
        (Interface((2, 3), (4, 8)), "is not contiguous"),
        (Interface((2, 3), (0, 4)), "is not contiguous"),
        (Interface((2, 3), None, mask=object()), "has a mask; give the values alone"),
    ],
)
def test_a_layout_on_the_gpu(given: Interface, message: str) -> None:
    if message:
        with pytest.raises(InputError, match=message):
            exchanged("x", given, 5)
        return
    found = exchanged("x", given, 5)
    assert isinstance(found, DeviceArray)
    assert (found.address, found.shape, found.nbytes, found.owner) == (4096, given.shape, 12 * given.shape[0], given)


class Versioned:
    """Claims to lie on a GPU, and gives the capsule of DLPack 1.0, for which it was not asked."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        return rows(2).__dlpack__(max_version=(1, 0))


@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) < (2, 1), reason="NumPy before 2.1 makes no versioned capsules"
)
def test_a_capsule_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"'x' cannot be taken over: .*incorrect name; give it as a numpy array"):
        exchanged("x", Versioned(), 5)


def test_strided_arrays_are_copied() -> None:
    array = np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2]
    with FakeRunner() as runner:
        np.testing.assert_array_equal(runner.infer({"x": array})["y"], 2 * array)
        np.testing.assert_array_equal(runner.infer({"x": Lender(array)})["y"], 2 * array)
        assert all(given.flags.c_contiguous for given in runner.given)
