"""The host-memory CUDA driver, a fake, itself: lazy streams, the ledger, misuse, failures on demand."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_cuda import HostCuda, compiled, library_folder

pytestmark = pytest.mark.host_cuda

SIZE = 256  # bytes
LEGACY, PER_THREAD = ctypes.c_void_p(1), ctypes.c_void_p(2)  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Calls:
    """The driver's functions by their exported names; what they give comes back, a code other than 0 is kept."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.code = 0

    def __call__(self, function: str, *arguments: Any) -> None:
        self.code = getattr(self.library, function)(*arguments)

    def given(self, function: str, *arguments: Any) -> Any:
        """What the function writes to its first parameter."""
        value = ctypes.c_void_p()
        self(function, ctypes.byref(value), *arguments)
        return ctypes.c_void_p(value.value)

    def device(self, size: int = SIZE) -> Any:
        return self.given("cuMemAlloc_v2", ctypes.c_size_t(size))

    def pinned(self, flags: int = 0) -> Any:
        return self.given("cuMemHostAlloc", ctypes.c_size_t(SIZE), flags)

    def stream(self) -> Any:
        return self.given("cuStreamCreate", 1)

    def up(self, target: Any, source: Any, stream: Any, size: int = SIZE) -> None:
        self("cuMemcpyHtoDAsync_v2", target, source, ctypes.c_size_t(size), stream)

    def down(self, target: Any, source: Any, stream: Any, size: int = SIZE) -> None:
        self("cuMemcpyDtoHAsync_v2", target, source, ctypes.c_size_t(size), stream)


@pytest.fixture
def cuda() -> Iterator[HostCuda]:
    """What a test leaves or does wrong is its subject."""
    cuda = HostCuda()
    cuda.reset()
    yield cuda
    cuda.reset()


@pytest.fixture
def call(cuda: HostCuda) -> Calls:
    calls = Calls()
    calls("cuInit", 0)
    calls("cuCtxPushCurrent_v2", calls.given("cuDevicePrimaryCtxRetain", 0))
    assert calls.code == 0
    return calls


def first_byte(address: Any) -> int:
    return ctypes.string_at(address, 1)[0]


def test_the_process_has_the_fake(cuda: HostCuda) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if "libcuda.so" in line}
    assert loaded == {str(library_folder() / "libcuda.so.1")}


# ---- laziness ----


@pytest.mark.parametrize("wait", ["cuStreamSynchronize", "cuStreamQuery", "cuCtxSynchronize", "cuEventSynchronize"])
def test_work_is_done_when_it_is_waited_for(wait: str, call: Calls) -> None:
    stream, memory, host, event = call.stream(), call.device(), call.pinned(), call.given("cuEventCreate", 0)
    ctypes.memset(host, 1, SIZE)
    call.up(memory, host, stream)
    call("cuEventRecord", event, stream)
    assert first_byte(memory) == 0xC3  # as new memory is filled
    ctypes.memset(host, 2, SIZE)  # too early: a real device might see it too
    call(wait, *([stream] if "Stream" in wait else [event] if "Event" in wait else []))
    assert (call.code, first_byte(memory)) == (0, 2)


def test_pageable_memory_is_copied_at_once_and_counted(call: Calls, cuda: HostCuda) -> None:
    stream, memory = call.stream(), call.device()
    host = (ctypes.c_byte * SIZE)(1)
    call.up(memory, host, stream)
    host[0] = 9
    call.down(host, memory, stream)
    assert (host[0], cuda.pageable_copies()) == (1, 2)


def test_a_stream_pulls_what_it_waits_for_and_no_more(call: Calls) -> None:
    first, second, event = call.stream(), call.stream(), call.given("cuEventCreate", 0)
    memory, host = [call.device(), call.device()], call.pinned()
    ctypes.memset(host, 5, SIZE)
    call.up(memory[0], host, first)
    call("cuEventRecord", event, first)
    call.up(memory[1], host, first)
    call("cuStreamWaitEvent", second, event, 0)
    call("cuStreamSynchronize", second)
    assert [first_byte(address) for address in memory] == [5, 0xC3]


@pytest.mark.parametrize("default", [LEGACY, PER_THREAD])
def test_default_streams_are_there_and_can_be_awaited(default: Any, call: Calls, cuda: HostCuda) -> None:
    stream, memory, host, event = call.stream(), call.device(), call.pinned(), call.given("cuEventCreate", 0)
    ctypes.memset(host, 7, SIZE)
    call.up(memory, host, default)
    call("cuEventRecord", event, default)
    call("cuStreamWaitEvent", stream, event, 0)
    assert first_byte(memory) == 0xC3
    call("cuStreamSynchronize", stream)
    assert (call.code, first_byte(memory), cuda.misuse) == (0, 7, [])
    assert cuda.live("stream") == 1


def test_host_functions_run_in_their_turn_and_in_graphs(call: Calls, cuda: HostCuda) -> None:
    stream = call.stream()
    seen: list[int] = []
    function = HOST_FUNCTION(seen.append)
    call("cuLaunchHostFunc", stream, function, ctypes.c_void_p(1))
    call("cuStreamBeginCapture_v2", stream, 1)
    call("cuLaunchHostFunc", stream, function, ctypes.c_void_p(2))
    graph = ctypes.c_void_p()
    call("cuStreamEndCapture", stream, ctypes.byref(graph))
    executable = call.given("cuGraphInstantiateWithFlags", graph, ctypes.c_uint64(0))
    call("cuGraphDestroy", graph)
    for _ in range(2):
        call("cuGraphLaunch", executable, stream)
    assert seen == []
    call("cuStreamSynchronize", stream)
    assert seen == [1, 2, 2]
    assert cuda.misuse == []


def test_a_host_function_may_not_call_the_driver(call: Calls, cuda: HostCuda) -> None:
    stream = call.stream()
    codes: list[int] = []
    function = HOST_FUNCTION(lambda _: codes.append(call.library.cuStreamQuery(stream)))
    call("cuLaunchHostFunc", stream, function, None)
    call("cuStreamSynchronize", stream)
    assert codes == [800]
    assert cuda.misuse == ["cuStreamQuery: called in a host function or kernel"]


# ---- the ledger ----


def test_a_leak_is_seen(call: Calls, cuda: HostCuda) -> None:
    call.device()
    assert (cuda.live("device"), cuda.live("stream"), cuda.live()) == (1, 0, 2)  # and the context
    with pytest.raises(AssertionError, match=r"not freed: \{'context': 1, 'device': 1\}"):
        cuda.assert_clean()
    cuda.reset()
    cuda.assert_clean()


def test_calls_are_counted(call: Calls, cuda: HostCuda) -> None:
    before = cuda.total_calls()
    call.device()
    call.device()
    assert (cuda.calls("cuMemAlloc"), cuda.total_calls() - before) == (2, 2)
    text = ctypes.c_char_p()
    call("cuGetErrorString", 2, ctypes.byref(text))
    assert (text.value, cuda.total_calls() - before) == (b"out of memory", 2)


@pytest.mark.parametrize("name", ["cuMemAlloc", "cuGraphInstantiate", "cuInit", "cuNoSuchThing"])
def test_functions_are_found_by_name(name: str, call: Calls) -> None:
    newest = {"cuMemAlloc": "cuMemAlloc_v2", "cuGraphInstantiate": "cuGraphInstantiateWithFlags"}.get(name, name)
    wanted = ctypes.cast(getattr(call.library, newest), ctypes.c_void_p).value if name != "cuNoSuchThing" else None
    found, status = ctypes.c_void_p(), ctypes.c_int(-1)
    arguments = (name.encode(), ctypes.byref(found), 13000, ctypes.c_uint64(0))
    call("cuGetProcAddress_v2", *arguments, ctypes.byref(status))
    assert (call.code, status.value, found.value) == ((0, 0, wanted) if wanted else (500, 1, None))
    call("cuGetProcAddress", *arguments)
    assert (call.code, found.value) == ((0, wanted) if wanted else (500, None))


def test_freed_memory_is_poisoned(call: Calls) -> None:
    memory = call.device()
    call("cuMemFree_v2", memory)
    assert ctypes.string_at(memory, SIZE) == b"\xa5" * SIZE


def test_memory_runs_out(call: Calls, cuda: HostCuda) -> None:
    cuda.set_device(memory=1000)
    memory = call.device(600)
    call.device(401)
    assert call.code == 2
    call("cuMemFree_v2", memory)
    call.device(1000)
    assert (call.code, cuda.misuse) == (0, [])


# ---- misuse ----


def use_after_free(call: Calls) -> None:
    memory = call.device()
    call("cuMemFree_v2", memory)
    call.up(memory, call.pinned(), call.stream())


def free_twice(call: Calls) -> None:
    memory = call.device()
    call("cuMemFree_v2", memory)
    call("cuMemFree_v2", memory)


def free_the_middle(call: Calls) -> None:
    call("cuMemFree_v2", ctypes.c_void_p(call.device().value + 16))


def free_what_is_copied(call: Calls) -> None:
    memory = call.device()
    call.up(memory, call.pinned(), call.stream())
    call("cuMemFree_v2", memory)


def copy_too_much(call: Calls) -> None:
    call.up(call.device(), call.pinned(), call.stream(), SIZE + 1)


def copy_too_far(call: Calls) -> None:
    call.down(ctypes.c_void_p(call.pinned().value + SIZE - 1), call.device(), call.stream(), 2)


def copy_the_wrong_way(call: Calls) -> None:
    call.up(call.pinned(), call.device(), call.stream())


def take_device_memory_for_host_memory(call: Calls) -> None:
    call.up(call.device(), call.device(), call.stream())


def use_the_default_stream(call: Calls) -> None:
    call.up(call.device(), call.pinned(), None)


def use_a_destroyed_stream(call: Calls) -> None:
    stream = call.stream()
    call("cuStreamDestroy_v2", stream)
    call("cuStreamSynchronize", stream)


def destroy_a_busy_stream(call: Calls) -> None:
    stream = call.stream()
    call.up(call.device(), call.pinned(), stream)
    call("cuStreamDestroy_v2", stream)


def take_an_event_for_a_stream(call: Calls) -> None:
    call("cuStreamSynchronize", call.given("cuEventCreate", 0))


def time_without_a_mark(call: Calls) -> None:
    event, time = call.given("cuEventCreate", 0), ctypes.c_float()
    call("cuEventElapsedTime", ctypes.byref(time), event, event)


def wait_while_capturing(call: Calls) -> None:
    stream = call.stream()
    call("cuStreamBeginCapture_v2", stream, 1)
    call("cuStreamSynchronize", stream)


def allocate_while_capturing(call: Calls) -> None:
    call("cuStreamBeginCapture_v2", call.stream(), 1)
    call.device()


def wait_for_an_event_while_capturing(call: Calls) -> None:
    event = call.given("cuEventCreate", 0)
    call("cuStreamBeginCapture_v2", call.stream(), 1)
    call("cuEventSynchronize", event)


def capture_a_default_stream(call: Calls) -> None:
    call("cuStreamBeginCapture_v2", LEGACY, 1)


def destroy_a_default_stream(call: Calls) -> None:
    call("cuStreamDestroy_v2", LEGACY)


def end_a_capture_that_was_not_begun(call: Calls) -> None:
    call("cuStreamEndCapture", call.stream(), ctypes.byref(ctypes.c_void_p()))


def replay_into_freed_memory(call: Calls) -> None:
    stream, memory, host, graph = call.stream(), call.device(), call.pinned(), ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", stream, 1)
    call.up(memory, host, stream)
    call("cuStreamEndCapture", stream, ctypes.byref(graph))
    executable = call.given("cuGraphInstantiateWithFlags", graph, ctypes.c_uint64(0))
    call("cuMemFree_v2", memory)
    call("cuGraphLaunch", executable, stream)


def call_without_a_context(call: Calls) -> None:
    call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    call.device()


def release_the_context_with_memory_in_it(call: Calls) -> None:
    call.device()
    call("cuDevicePrimaryCtxRelease_v2", 0)


def call_what_the_fake_does_not_have(call: Calls) -> None:
    call("cuArrayDestroy", None)


MISUSES = {
    use_after_free: (1, "is freed memory"),
    free_twice: (1, "is freed already"),
    free_the_middle: (1, "is not what was allocated"),
    free_what_is_copied: (0, "queued work uses"),
    copy_too_much: (1, "257 bytes at .*, the block has 256 from there"),
    copy_too_far: (1, "2 bytes at .*, the block has 1 from there"),
    copy_the_wrong_way: (1, "is not mapped for the device"),
    take_device_memory_for_host_memory: (1, "is memory of the device"),
    use_the_default_stream: (400, "on the default stream"),
    use_a_destroyed_stream: (400, "the stream .* is destroyed"),
    destroy_a_busy_stream: (0, "work is queued in it"),
    take_an_event_for_a_stream: (400, "is no stream"),
    time_without_a_mark: (400, "an event has no mark"),
    wait_while_capturing: (900, "the stream captures"),
    allocate_while_capturing: (900, "not allowed while a stream captures"),
    wait_for_an_event_while_capturing: (900, "not allowed while a stream captures"),
    capture_a_default_stream: (900, "a default stream"),
    destroy_a_default_stream: (400, "a default stream"),
    end_a_capture_that_was_not_begun: (401, "it does not capture"),
    replay_into_freed_memory: (1, "it copies from or to freed memory"),
    call_without_a_context: (201, "no context is current in this thread"),
    release_the_context_with_memory_in_it: (0, "1 device still alive"),
    call_what_the_fake_does_not_have: (801, "the fake does not have it"),
}


@pytest.mark.parametrize("do", MISUSES)
def test_misuse_is_noted_and_answered(do: Any, call: Calls, cuda: HostCuda) -> None:
    do(call)
    code, text = MISUSES[do]
    assert call.code == code
    assert len(cuda.misuse) == 1
    with pytest.raises(AssertionError, match=text):
        cuda.assert_clean()


# ---- failures on demand ----


def test_the_kth_call_fails_and_no_other(call: Calls, cuda: HostCuda) -> None:
    codes = []
    cuda.fail_call(2, 304)
    for _ in range(3):
        call.stream()
        codes.append(call.code)
    assert (codes, cuda.live("stream")) == ([0, 304, 0], 2)


def test_calls_of_one_name_fail(call: Calls, cuda: HostCuda) -> None:
    cuda.fail_named("cuMemAlloc", 2, times=2)
    codes = []
    for _ in range(3):
        call.stream()
        codes.append(call.code)
        call.device()
        codes.append(call.code)
    assert codes == [0, 2, 0, 2, 0, 0]


def test_what_frees_frees_though_it_fails(call: Calls, cuda: HostCuda) -> None:
    memory = call.device()
    cuda.fail_named("cuMemFree", 1)
    call("cuMemFree_v2", memory)
    assert (call.code, cuda.live("device")) == (1, 0)


def test_a_lost_device_stays_lost(call: Calls, cuda: HostCuda) -> None:
    stream, memory, host = call.stream(), call.device(), call.pinned()
    call.up(memory, host, stream)
    cuda.fail_named("cuStreamSynchronize", 700)
    for function in ("cuStreamSynchronize", "cuStreamQuery", "cuStreamDestroy_v2"):
        call(function, stream)
        assert call.code == 700
    assert first_byte(memory) == 0xC3  # what was queued is never done
    assert (cuda.live("stream"), cuda.misuse) == (0, [])


def test_the_helper_that_compiles_reports_what_the_compiler_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("broken") / "broken.c"
    source.write_text("int broken(void) { return nothing; }\n")
    with pytest.raises(RuntimeError, match="nothing"):
        compiled("broken.so", [source])
