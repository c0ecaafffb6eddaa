"""Child processes: what they answer, what becomes of those that crash, run out of memory or talk nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from edgewright.runtime.device import child, memory, worker
from edgewright.runtime.device.child import answer_of
from edgewright.runtime.device.memory import Memory, least_available, memory_here, resident_memory
from edgewright.runtime.errors import BuildError, BundleError, EngineError

READ = "import json, os, sys, time; request = json.loads(sys.stdin.readline()); "


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def answer_to(code: str, monkeypatch: pytest.MonkeyPatch, *, floor: int | None = None) -> dict[str, object]:
    """What comes of a child that runs `code`."""
    monkeypatch.setattr(child, "START", READ + code)
    return answer_of({"task": "play"}, "the play", floor=floor)


def test_the_answer_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_to("print(json.dumps({'result': request}))", monkeypatch) == {"task": "play"}


def test_a_long_answer_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a pipe holds."""
    answer = answer_to("print(json.dumps({'result': {'words': 'x' * 1_000_000}}))", monkeypatch)
    assert answer == {"words": "x" * 1_000_000}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('hello')", "code 0 and without an answer$"),
        ("pass", "code 0 and without an answer$"),
        ("print('[1]')", "code 0 and without an answer$"),
        ("print(json.dumps({'result': 3}))", "code 0 and without an answer$"),
        ("print(json.dumps({'result': {}}) * 2)", "without an answer"),
        ("print(json.dumps({'result': {}})); sys.exit(3)", "code 3 and without an answer"),
        ("print('first', file=sys.stderr); sys.exit('the last word')", "code 1.*it said last: the last word"),
        ("os.write(1, bytes(range(256)) * 100); os.write(2, bytes(range(200, 256)))", "without an answer"),
    ],
)
def test_nonsense_is_explained(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=words):
        answer_to(code, monkeypatch)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"the play was killed; .*the kernel did.*--workspace"),
        (signal.SIGSEGV, r"the play crashed \(SIGSEGV\); it said last: too much"),
        (signal.SIGABRT, r"the play crashed \(SIGABRT\)"),
    ],
)
def test_a_child_that_a_signal_ends(number: signal.Signals, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"print('too much', file=sys.stderr, flush=True); os.kill(os.getpid(), {int(number)})"
    with pytest.raises(BuildError, match=words):
        answer_to(code, monkeypatch)


def test_an_answer_before_a_crash_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="SIGSEGV"):
        answer_to(
            f"print(json.dumps({{'result': {{}}}}), flush=True); os.kill(os.getpid(), {signal.SIGSEGV})", monkeypatch
        )


@pytest.mark.parametrize(
    ("kind", "expected"), [("BundleError", BundleError), ("EngineError", EngineError), ("int", BuildError)]
)
def test_an_error_of_our_own_is_raised_here(
    kind: str, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(expected, match="the fact; the remedy"):
        answer_to(
            f"print(json.dumps({{'error': {kind!r}, 'message': 'the fact', 'remedy': 'the remedy'}}))", monkeypatch
        )


def test_too_little_memory_ends_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The floor is above all that there is."""
    began = time.monotonic()
    with pytest.raises(
        BuildError, match=r"the play was ended, because only [\d,]+ MB .*, less than the .* MB"
    ) as caught:
        answer_to(f"time.sleep(30); open({str(tmp_path / 'done')!r}, 'w')", monkeypatch, floor=1 << 60)
    assert "--workspace" in caught.value.remedy
    assert "swap" in caught.value.remedy
    assert time.monotonic() - began < 10


def test_memory_is_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([10**9, 10**9, 10**8])
    monkeypatch.setattr(child, "memory_here", lambda: Memory(16 * 10**9, next(sizes)))
    with pytest.raises(BuildError, match=r"only 100 MB .* less than the 800 MB"):
        answer_to("time.sleep(30)", monkeypatch)


def test_enough_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "time.sleep(0.3); print(json.dumps({'result': {}}))"
    assert answer_to(code, monkeypatch, floor=1) == {}
    monkeypatch.setattr(child, "memory_here", lambda: None)  # no Linux
    assert answer_to(code, monkeypatch) == {}


def test_ctrl_c_ends_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process_file = tmp_path / "process"

    def interrupt() -> None:
        while not process_file.exists() or not process_file.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        answer_to(f"open({str(process_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)", monkeypatch)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process_file.read_text()), 0)


def test_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(BuildError, match="the play cannot be started: /nowhere/python: No such file"):
        answer_to("", monkeypatch)


def test_it_finds_the_modules_of_this_process_and_none_of_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the current folder is trusted')")
    monkeypatch.chdir(tmp_path)
    assert child.__package__ == "edgewright.runtime.device"
    with pytest.raises(BuildError, match="KeyError"):
        answer_of({"task": "unknown"}, "the play")


def test_what_libraries_print_is_no_part_of_the_answer() -> None:
    code = """
        import os
        from edgewright.runtime.device import worker
        class Loud:
            @classmethod
            def from_json(cls, content): return cls()
            def run(self):
                print("from Python"); os.system("echo from a library"); return {"done": True}
        worker.TASKS = {"loud": Loud}
        raise SystemExit(worker.main())
    """
    with started(code) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"task": "loud"}\n')
        process.stdin.flush()
        assert process.stdout.read() == b'{"result": {"done": true}}'


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = """
        import time
        from edgewright.runtime.device import worker
        class Slow:
            @classmethod
            def from_json(cls, content): return cls()
            def run(self): time.sleep(60); return {}
        worker.TASKS = {"slow": Slow}
        raise SystemExit(worker.main())
    """
    with started(code) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"task": "slow"}\n')
        process.stdin.close()
        assert process.wait(timeout=30) == 1


@pytest.mark.parametrize(
    ("error", "document"),
    [
        (BundleError("fact", "remedy"), {"error": "BundleError", "message": "fact", "remedy": "remedy"}),
        (ValueError("two\nlines"), {"error": "BuildError", "message": "ValueError: two lines", "remedy": ""}),
        (MemoryError(), {"error": "BuildError", "message": "memory ran out"}),
    ],
)
def test_the_worker_answers_with_errors(
    error: Exception, document: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        @classmethod
        def from_json(cls, content: object) -> Failing:
            raise error

    monkeypatch.setattr(worker, "TASKS", {"fail": Failing})
    assert document.items() <= worker.answer({"task": "fail"}).items()


@pytest.mark.parametrize(("total", "floor"), [(2 * 10**9, 200 * 10**6), (8 * 10**9, 400 * 10**6)])
def test_the_floor(total: int, floor: int) -> None:
    assert least_available(Memory(total, total)) == floor


def test_memory_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        2000 kB\nMemFree:   10 kB\nMemAvailable:    1000 kB\nHuge: 3\n")
    assert memory_here(tmp_path) == Memory(2000 * 1024, 1000 * 1024)
    (tmp_path / "meminfo").write_text("MemTotal:        2000 kB\n")
    assert memory_here(tmp_path) is None
    assert memory_here(tmp_path / "none") is None


def test_this_process_has_memory() -> None:
    here = memory_here()
    assert here is not None
    assert 10**7 < resident_memory(os.getpid()) < here.total
    assert here.available <= here.total
    assert resident_memory(2**22 + 1) == 0  # beyond the largest process number
    assert Path("/proc") == memory.PROC
