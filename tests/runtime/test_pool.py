"""`SessionPool`: sessions over one engine, lent to threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.runtime import Session, SessionPool
from edgewright.runtime.errors import ClosedError, DataError, EngineError
from toy_build import PREPROCESS, expected_logits, normal, photograph, put_engine


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder with one engine."""
    put_engine(tmp_path)
    return tmp_path


def together(count: int, work: Callable[[int], None]) -> None:
    """Does `work` in as many threads, and raises what one of them raised."""
    failed: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_eight_threads_get_their_own_answers(build: Path) -> None:
    with SessionPool(build, size=3, threads=1) as pool:

        def work(index: int) -> None:
            for turn in range(20):
                batch = normal(f"{index} {turn}", 1 + turn % 4, 3, 8, 8)
                found = pool.infer(batch)["logits"]
                np.testing.assert_allclose(found, expected_logits("fp32", batch), rtol=1e-4, atol=1e-4)

        together(8, work)


def test_images_are_classified(build: Path) -> None:
    pictures = [photograph(seed) for seed in range(3)]
    with SessionPool(build, size=2) as pool:
        found = pool.classify(pictures, top=1)
    wanted = expected_logits("fp32", PREPROCESS.batch(pictures)).argmax(axis=1)
    assert [row[0].index for row in found] == list(wanted)


def test_no_more_are_lent_than_there_are(build: Path) -> None:
    lent: set[Any] = set()
    most = 0
    lock = threading.Lock()
    with SessionPool(build, size=2, threads=1) as pool:

        def work(_: int) -> None:
            nonlocal most
            with pool.session() as session:
                with lock:
                    assert session not in lent
                    lent.add(session)
                    most = max(most, len(lent))
                time.sleep(0.005)
                with lock:
                    lent.remove(session)

        together(8, work)
    assert most == 2


def test_it_waits_until_one_comes_back(build: Path) -> None:
    with SessionPool(build, size=1) as pool:
        order: list[str] = []

        def waiting() -> None:
            with pool.session():
                order.append("waited")

        with pool.session():
            thread = threading.Thread(target=waiting)
            thread.start()
            time.sleep(0.02)
            order.append("first")
        thread.join()
    assert order == ["first", "waited"]


def test_a_session_comes_back_after_an_error_too(build: Path) -> None:
    with SessionPool(build, size=1) as pool:
        with pytest.raises(EngineError, match="expected float32"):
            pool.infer(np.zeros((1, 3, 8, 8)))
        with pytest.raises(DataError, match="top is 0"):
            pool.classify([photograph()], top=0)
        assert len(pool.classify([photograph()])) == 1


def test_a_session_comes_back_when_waiting_for_it_is_interrupted(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Session) -> None:
        raise KeyboardInterrupt

    with SessionPool(build, size=1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "drop", interrupted)
            with pytest.raises(KeyboardInterrupt), pool.session():
                pass
        assert len(vars(pool)["_idle"]) == 1  # or the next line would wait for ever
        assert len(pool.classify([photograph()])) == 1


def test_what_is_in_flight_does_not_meet_the_next_borrower(build: Path) -> None:
    with SessionPool(build, size=1) as pool:
        with pool.session() as session:
            session.submit(normal("forgotten", 1, 3, 8, 8))
        batch = normal("batch", 1, 3, 8, 8)
        np.testing.assert_allclose(pool.infer(batch)["logits"], expected_logits("fp32", batch), rtol=1e-4, atol=1e-4)


def test_closing_waits_for_none_and_frees_what_comes_back(build: Path) -> None:
    pool = SessionPool(build, size=2)
    with pool.session() as session:
        pool.close()
        assert session.infer(normal("batch", 1, 3, 8, 8))["logits"].shape == (1, 6)  # still lent
        with pytest.raises(ClosedError, match="the pool is closed; open it again"):
            pool.infer(normal("batch", 1, 3, 8, 8))
    with pytest.raises(ClosedError, match="the engine is closed"):
        session.infer(normal("batch", 1, 3, 8, 8))
    pool.close()


def test_who_waits_for_a_closed_pool_is_told(build: Path) -> None:
    pool = SessionPool(build, size=1)
    told: list[BaseException] = []

    def waiting() -> None:
        try:
            pool.classify([photograph()])
        except ClosedError as error:
            told.append(error)

    with pool.session():
        threads = [threading.Thread(target=waiting) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        pool.close()
        for thread in threads:
            thread.join()
    assert len(told) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "has size 0, expected at least 1"), ({"precision": "int8"}, "int8"), ({"provider": "x"}, "'x'")],
)
def test_what_cannot_be_opened_is_said(build: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SessionPool(build, **options)
