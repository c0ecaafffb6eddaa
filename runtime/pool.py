"""`SessionPool`: sessions over one loaded engine, lent to threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, EngineError
from .preprocess import ImageLike
from .session import Prediction, Session

__all__ = ["SessionPool"]


class SessionPool:
    """Several sessions for several threads, over an engine that is loaded once. Use it in a `with`, or close it.

    >>> with SessionPool("build/mobilenet_effnet_b0", size=4) as pool:
    ...     (predictions,) = pool.classify(["shoe.png"])  # from any thread
    """

    def __init__(self, path: str | Path, size: int = 4, **options: Any) -> None:
        """Opens `size` sessions; `options` are those of `Session.open`, and so is what is raised."""
        if size < 1:
            raise EngineError(f"the pool has size {size}, expected at least 1")
        self.size = size
        self._closed = False
        self._changed = threading.Condition()
        with ExitStack() as failing:
            first = failing.enter_context(Session.open(path, **options))
            self._idle = [first, *(failing.enter_context(first.sibling()) for _ in range(size - 1))]
            failing.pop_all()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Lends a session, for one thread; waits while all are lent.

        What is in flight when it comes back is dropped. Raises `ClosedError` if the pool is closed, also while it
        waits.
        """
        lent = self._lent()
        try:
            yield lent
        finally:
            self._take_back(lent)

    def infer(self, batch: Any) -> dict[str, NDArray[np.float32]]:
        """`Session.infer` of the next session that is free."""
        with self.session() as session:
            return session.infer(batch)

    def classify(self, images: Sequence[ImageLike], top: int = 5) -> list[list[Prediction]]:
        """`Session.classify` of the next session that is free."""
        with self.session() as session:
            return session.classify(images, top)

    def close(self) -> None:
        """Frees the sessions that are not lent, and each of the others when it comes back; waits for none of them."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        with ExitStack() as closing:
            for session in idle:
                closing.callback(session.close)

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lent(self) -> Session:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise ClosedError("the pool is closed", "open it again")
            return self._idle.pop()

    def _take_back(self, lent: Session) -> None:
        try:
            lent.drop()
        finally:  # it waits, and may be interrupted
            with self._changed:
                closed = self._closed
                if not closed:
                    self._idle.append(lent)
                    self._changed.notify()
            if closed:
                lent.close()
