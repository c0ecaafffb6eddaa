"""The audit: which kernel runs a layer, shares of the work, and traffic, all against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.runtime.audit import MISSING, Traffic, audited, deviations, in_words, shares_of_work, traffic
from edgewright.runtime.specs import Kernel, LayerPrecision, PlannedLayer

PLANNED = (
    PlannedLayer("stem", "Conv", "int8", 600),
    PlannedLayer("depthwise", "Conv", "fp16", 100),
    PlannedLayer("head", "Gemm", "int8", 300),
)


def kernel(name: str, precision: str, *sources: str, computes: bool = False) -> Kernel:
    return Kernel(name, "kind", sources, precision, computes=computes)


def layer(name: str, requested: str, actual: str, macs: int) -> LayerPrecision:
    return LayerPrecision(name, "Conv", requested, actual, macs, "kernel")


def found(*kernels: Kernel) -> dict[str, tuple[str, str]]:
    """Per planned layer the precision and the kernel that the audit gives it."""
    return {each.name: (each.actual, each.kernel) for each in audited(PLANNED, kernels)}


# --- Which kernel runs a layer -----------------------------------------------------------------------------------


def test_each_layer_gets_the_kernel_that_names_it() -> None:
    layers = audited(
        PLANNED,
        [kernel("k2", "int8", "head"), kernel("k0", "int8", "stem", "relu"), kernel("k1", "fp16", "depthwise")],
    )
    assert layers == (
        LayerPrecision("stem", "Conv", "int8", "int8", 600, "k0"),
        LayerPrecision("depthwise", "Conv", "fp16", "fp16", 100, "k1"),
        LayerPrecision("head", "Gemm", "int8", "int8", 300, "k2"),
    )


def test_one_kernel_may_run_two_layers() -> None:
    both = found(kernel("k", "fp16", "stem", "depthwise"), kernel("h", "int8", "head"))
    assert both == {"stem": ("fp16", "k"), "depthwise": ("fp16", "k"), "head": ("int8", "h")}


@pytest.mark.parametrize("kernels", [(), (kernel("copy", "int8"),), (kernel("k", "int8", "Stem", "stem_", "st"),)])
def test_a_layer_that_no_kernel_names_is_missing(kernels: tuple[Kernel, ...]) -> None:
    layers = audited(PLANNED, kernels)
    assert [(each.actual, each.kernel) for each in layers] == [(MISSING, "")] * 3
    assert [each.name for each in deviations(layers)] == ["stem", "head", "depthwise"], "missing is no precision"


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_kernels_the_one_that_multiplies_counts(turned: bool) -> None:
    kernels = [kernel("product", "int8", "stem", computes=True), kernel("bias", "fp32", "stem")]
    assert found(*(reversed(kernels) if turned else kernels))["stem"] == ("int8", "product")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [("int8", "fp16"), ("int8", "fp32"), ("fp16", "bf16"), ("bf16", "fp32"), ("fp32", "fp64"), ("int8", "unknown")],
)
def test_of_several_equals_the_wider_counts(turned: bool, computes: bool, narrow: str, wide: str) -> None:
    kernels = [kernel("n", narrow, "stem", computes=computes), kernel("w", wide, "stem", computes=computes)]
    assert found(*(reversed(kernels) if turned else kernels))["stem"] == (wide, "w")


def test_nothing_planned_is_nothing_audited() -> None:
    assert audited((), [kernel("k", "fp32", "stem")]) == ()


# --- Deviations and shares ---------------------------------------------------------------------------------------

LAYERS = (
    layer("a", "int8", "int8", 500),
    layer("b", "int8", "fp16", 20),
    layer("c", "fp16", "fp16", 150),
    layer("d", "fp16", "fp32", 250),
    layer("e", "int8", MISSING, 80),
)


def test_deviations_are_those_with_the_most_work_first() -> None:
    assert [each.name for each in deviations(LAYERS)] == ["d", "e", "b"]
    assert deviations(LAYERS[:1]) == ()
    assert deviations(()) == ()


def test_a_layer_in_a_narrower_precision_than_planned_deviates_too() -> None:
    narrower = layer("x", "fp16", "int8", 1)
    assert deviations((narrower,)) == (narrower,)


@pytest.mark.parametrize(
    ("precision", "planned", "actual"),
    [("int8", 0.6, 0.5), ("fp16", 0.4, 0.17), ("fp32", 0.0, 0.25), ("bf16", 0.0, 0.0), (MISSING, 0.0, 0.08)],
)
def test_shares_are_weighed_by_work(precision: str, planned: float, actual: float) -> None:
    assert shares_of_work(LAYERS, precision) == pytest.approx((planned, actual), abs=1e-15)
    counted = sum(each.actual == precision for each in LAYERS) / len(LAYERS)  # a mutant: each layer counts the same
    assert counted == 0.0 or counted != pytest.approx(actual)


def test_shares_without_work_are_zero() -> None:
    assert shares_of_work((), "int8") == (0.0, 0.0)
    assert shares_of_work((layer("a", "int8", "int8", 0),), "int8") == (0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["int8", "fp16", "fp32"]), st.integers(0, 10**12)), min_size=1))
def test_shares_of_all_precisions_add_up(drawn: list[tuple[str, int]]) -> None:
    layers = [layer(str(index), "int8", actual, macs) for index, (actual, macs) in enumerate(drawn)]
    total = sum(shares_of_work(layers, precision)[1] for precision in ("int8", "fp16", "fp32"))
    assert total == pytest.approx(1.0 if any(macs for _, macs in drawn) else 0.0)


# --- Traffic -----------------------------------------------------------------------------------------------------

MOVING = (
    Kernel("a", "", (), "int8", bytes_read=1000, bytes_written=200),
    Kernel("b", "", (), "fp16", bytes_read=30, bytes_written=0),
    Kernel("c", "", (), "fp16", bytes_read=0, bytes_written=4),
)


def test_traffic_is_the_sum_over_kernels() -> None:
    total = traffic(MOVING)
    assert total == Traffic(3, 1030, 204)
    assert total is not None
    assert total.bytes_moved == 1234


@pytest.mark.parametrize("unknown", ["bytes_read", "bytes_written"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_kernel_of_unknown_traffic_makes_the_sum_unknown(unknown: str, place: int) -> None:
    silent: dict[str, Any] = {unknown: None}
    kernels = [replace(each, **silent) if index == place else each for index, each in enumerate(MOVING)]
    assert traffic(kernels) is None, "a sum over the others would be too small"


def test_an_engine_without_kernels_says_nothing_of_its_traffic() -> None:
    assert traffic(()) is None


@pytest.mark.parametrize(
    ("kernels", "read", "written", "expected"),
    [
        (10, 600, 400, True),  # equal
        (9, 600, 400, True),
        (10, 599, 400, True),
        (10, 400, 600, True),  # read or written is the same
        (10, 0, 1000, True),
        (11, 0, 0, False),
        (10, 601, 400, False),
        (10, 600, 401, False),
        (1, 1001, 0, False),
    ],
)
def test_at_most_needs_neither_more_kernels_nor_more_bytes(
    kernels: int, read: int, written: int, expected: bool
) -> None:
    assert Traffic(kernels, read, written).at_most(Traffic(10, 600, 400)) is expected


def test_traffic_in_words() -> None:
    assert in_words(Traffic(52, 24_300_000, 4_460_000)) == "52 kernels and 28.8 MB"
