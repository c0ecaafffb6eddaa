"""What a build or a verification says: a row for each engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import Bundle
from ..errors import BundleError, EdgewrightError, WorkspaceError
from ..specs import EngineInfo
from .child import answer_of
from .kept import Kept, KeptEngine, SelfTest
from .resizing import resize_warning
from .tasks import SelfTestTask

__all__ = ["DeviceReport", "DeviceRow", "device_report", "kept_row", "self_test_row"]


@dataclass(frozen=True)
class DeviceRow:
    """One engine of a bundle on this device; the words of `status` are those of the contract.

    * path: of the engine file, None if there is none; info: what it is
    * self_test: what it gave, also where the engine was discarded
    * reused: nothing was built, since a proven engine was kept already
    """

    backend: str
    precision: str
    status: str
    reason_code: str
    reason: str
    path: Path | None = None
    info: EngineInfo | None = None
    self_test: SelfTest | None = None
    reused: bool = False


@dataclass(frozen=True)
class DeviceReport:
    """What became of a bundle's engines.

    * bundle: its hash; signed_by: the key that was required, None if none was
    * warnings: what differs here, whatever the engines give
    """

    model: str
    version: int
    bundle: str
    signed_by: str | None
    cache: Path
    rows: tuple[DeviceRow, ...]
    warnings: tuple[str, ...]


def device_report(bundle: Bundle, cache: Path, rows: Iterable[DeviceRow]) -> DeviceReport:
    """The rows of a bundle, and what is to be said of it."""
    warning = resize_warning(bundle)
    return DeviceReport(
        model=bundle.model,
        version=bundle.version,
        bundle=bundle.sha256,
        signed_by=bundle.signed_by,
        cache=cache,
        rows=tuple(rows),
        warnings=(warning,) if warning else (),
    )


def kept_row(row: DeviceRow, kept: Kept, engine: KeptEngine) -> DeviceRow:
    """`row` with what is known of an engine that is kept."""
    return _judged(row, kept.folder / engine.file, engine.info, engine.self_test)


def self_test_row(row: DeviceRow, bundle: Bundle, file: Path, info: EngineInfo, floor: int | None = None) -> DeviceRow:
    """`row` with what the self-test of the engine in `file` gives, in a new process; failed if it gives no answer.

    Raises `BundleError` and `WorkspaceError`, which are no fault of the engine.
    """
    task = SelfTestTask(str(bundle.path.absolute()), bundle.sha256, str(file.absolute()), info)
    try:
        answer = answer_of(task.to_json(), f"the self-test of {row.backend} {row.precision}", floor=floor)
    except (BundleError, WorkspaceError):
        raise
    except EdgewrightError as error:
        return replace(row, status="failed", reason_code="run_failed", reason=str(error), path=file, info=info)
    return _judged(row, file, info, SelfTest.from_json(answer))


def _judged(row: DeviceRow, file: Path, info: EngineInfo, test: SelfTest) -> DeviceRow:
    status, code = ("verified", "pass") if test.passed else ("over_budget", "self_test_failed")
    return replace(row, status=status, reason_code=code, reason=test.reason, path=file, info=info, self_test=test)
