"""What is concluded from the rows: the verdict, the recommendation, and which engine to take to a GPU elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgewright.outcome import WORTH_IT, EngineRow, conclusion, target_choices
from edgewright.runtime.audit import Traffic
from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import Parity, compare
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import EngineInfo, Kernel

PREPROCESS = Preprocess((4, 4), None, (0.5,) * 3, (0.5,) * 3)


def parity(source: Any) -> Parity:
    logits = np.eye(4, dtype=np.float32)
    return compare(logits, logits, np.arange(4), source=source)


def row(
    precision: str, kernels: int = 10, moved: int | None = 1000, code: str = "pass", target: str = "sm86", **more: Any
) -> EngineRow:
    """A simulated row of so many kernels that together move so many bytes; None is unknown."""
    read = None if moved is None else moved - 1
    listed = [
        Kernel("k0", "", (), precision, read, 1),
        *(Kernel(f"k{i}", "", (), precision, 0, 0) for i in range(1, kernels)),
    ]
    info = EngineInfo("rtx", precision, target, (), (), PREPROCESS, (), "", "", 1, (), tuple(listed[:kernels]))
    simulated = EngineRow(
        "rtx", precision, target, "simulated", code, "", f"{precision}-{target}", info, parity("simulation")
    )
    return replace(simulated, **more)


def ran(precision: str, status: str, p50: float | None) -> EngineRow:
    latency = None if p50 is None else Latency(1, 2, 9, p50, p50, p50, 0.0)
    return EngineRow("cpu", precision, None, status, "", "", parity=parity("engine"), latency=latency)


# --- The conclusion ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "verdict", "recommended"),
    [
        ([], "fail", None),
        ([ran("fp32", "verified", 2.0), ran("int8", "verified", 1.0)], "pass", "int8"),
        ([ran("fp32", "verified", 1.0), ran("int8", "verified", 1.0)], "pass", "fp32"),
        ([ran("fp32", "verified", None), ran("int8", "verified", 9.0)], "pass", "int8"),
        ([ran("fp32", "verified", 2.0), ran("int8", "over_budget", 1.0)], "pass", "fp32"),
        ([ran("fp32", "undecided", 1.0), ran("int8", "over_budget", 1.0)], "inconclusive", None),
        ([ran("fp32", "over_budget", 1.0)], "fail", None),
        ([ran("fp32", "verified", 5.0), row("int8")], "pass", "fp32"),
        ([row("fp16"), row("int8")], "inconclusive", None),  # nothing ran here
        ([row("fp16", code="fail"), row("int8", code="fail")], "fail", None),  # nor would it pass
        ([row("fp16"), ran("int8", "over_budget", 1.0)], "fail", None),
    ],
)
def test_only_what_ran_here_decides(rows: list[EngineRow], verdict: str, recommended: str | None) -> None:
    found, best = conclusion(rows)
    assert found == verdict
    assert (best.precision if best else None) == recommended


def test_a_simulated_row_did_not_run() -> None:
    assert not row("int8").ran
    assert not replace(row("int8"), parity=None).ran
    assert ran("int8", "verified", 1.0).ran


def test_traffic_of_a_row_is_that_of_its_kernels() -> None:
    assert row("int8", 10, 1000).traffic == Traffic(10, 999, 1)
    assert row("int8", 10, None).traffic is None
    assert replace(row("int8"), info=None).traffic is None


# --- The engine for a target -------------------------------------------------------------------------------------


def choice(*rows: EngineRow) -> tuple[str, str] | None:
    """The precision and the reason chosen for the one target of `rows`."""
    choices = target_choices(rows)
    if not choices:
        return None
    (only,) = choices
    return only.row.precision, only.reason


@pytest.mark.parametrize(
    ("kernels", "moved", "expected"),
    [
        (10, 970_000, "int8"),  # 97 %, no more
        (10, 970_001, "fp16"),  # not worth it
        (10, 500_000, "int8"),
        (9, 970_000, "int8"),
        (11, 500_000, "fp16"),  # a kernel more
        (5, 999_000, "fp16"),  # fewer kernels alone are no reason
        (10, 1_000_000, "fp16"),
        (9, 2_000_000, "fp16"),
    ],
)
def test_int8_is_taken_where_it_saves_bytes_and_costs_no_kernel(kernels: int, moved: int, expected: str) -> None:
    assert WORTH_IT == 0.97
    found = choice(row("fp16", 10, 1_000_000), row("int8", kernels, moved))
    assert found == (expected, f"int8 {kernels} kernels and {moved / 1e6:.1f} MB, fp16 10 kernels and 1.0 MB")


@pytest.mark.parametrize("code", ["fail", "inconclusive"])
def test_only_what_passes_is_taken(code: str) -> None:
    cheap = row("int8", 10, 1, code)
    assert choice(row("fp16"), cheap) == ("fp16", "the only one that passes")
    assert choice(row("fp16", code=code), row("int8", 99, 9999)) is None, "it moves more than FP16 would"
    assert choice(row("fp16", 10, 1_000_000, code), row("int8", 10, 500_000)) is not None
    assert choice(row("int8", 1, 1)) is None, "nothing to compare with"
    assert choice(row("fp16", code=code), cheap) is None


@pytest.mark.parametrize(("half", "int8"), [(1000, None), (None, 1), (None, None)])
def test_unknown_traffic_is_no_reason_for_int8(half: int | None, int8: int | None) -> None:
    found = choice(row("fp16", moved=half), row("int8", moved=int8))
    assert found == ("fp16", "what INT8 moves is not known")


def test_what_was_not_simulated_is_not_taken() -> None:
    without: dict[str, Any] = {"parity": None, "status": "built_not_run", "reason_code": "device_missing"}
    assert choice(row("fp32", **without)) is None
    assert choice(row("fp32", **without), row("fp16")) == ("fp16", "the only one that passes")
    assert choice(row("fp16", **without), row("int8", **without)) is None
    assert choice(replace(row("fp16", **without), reason_code="pass")) is None


def test_fp32_is_never_the_choice_for_a_gpu() -> None:
    assert choice(row("fp32", 1, 1), row("fp16")) == ("fp16", "the only one that passes")


def test_each_target_has_its_own_choice_in_the_order_of_the_rows() -> None:
    rows = (
        row("fp16", target="sm89"),
        row("int8", moved=100, target="sm89"),
        row("fp16", target="sm86"),
        row("int8", kernels=12, moved=100, target="sm86"),
        row("fp16", code="fail", target="sm120"),
    )
    assert [(each.target, each.row.path) for each in target_choices(rows)] == [
        ("sm89", "int8-sm89"),
        ("sm86", "fp16-sm86"),
    ]


def test_what_ran_here_is_no_target_elsewhere() -> None:
    here = [replace(row(precision), parity=parity("engine"), status="verified") for precision in ("fp16", "int8")]
    assert target_choices(here) == ()
    assert target_choices([ran("fp32", "verified", 1.0), ran("int8", "verified", 1.0)]) == ()
    assert target_choices(()) == ()
