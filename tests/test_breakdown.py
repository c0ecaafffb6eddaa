"""Kernel times and bytes by the stages of a network."""

from __future__ import annotations

from edgewright.breakdown import by_kind, by_stage, graph_stages, stage_names
from edgewright.optimize.summary import summary
from edgewright.runtime.backends.base import KernelTime
from edgewright.runtime.specs import Kernel
from mixed_network import network

KNOWN = {"stem/Conv": "stem", "stem/Relu": "stem", "body/Conv": "body", "head/Gemm": "head"}


def kernel(milliseconds: float, kind: str, *sources: str) -> KernelTime:
    return KernelTime(Kernel(kind, kind, sources, "int8"), milliseconds)


TIMES = (
    kernel(0.5, "Reorder"),
    kernel(1.0, "Conv", "stem/Conv", "stem/Relu"),
    kernel(0.25, "Quantize"),
    kernel(4.0, "Conv", "body/Conv"),
    kernel(0.125, "Reorder"),
)


def test_a_kernel_without_a_layer_belongs_to_the_one_before() -> None:
    shares = {share.name: (share.kernels, share.milliseconds) for share in by_stage(TIMES, KNOWN)}
    assert shares == {"stem": (3, 1.75), "body": (2, 4.125)}, "nothing runs in the head"
    assert sum(share.milliseconds for share in by_stage(TIMES, KNOWN)) == sum(time.milliseconds for time in TIMES)


def test_kinds_come_with_the_slowest_first() -> None:
    shares = [(share.name, share.kernels, share.milliseconds) for share in by_kind(TIMES)]
    assert shares == [("Conv int8", 2, 5.0), ("Reorder int8", 2, 0.625), ("Quantize int8", 1, 0.25)]


def test_an_engine_that_is_not_timed() -> None:
    assert by_stage((), KNOWN) == by_kind(()) == ()


def test_the_stages_of_a_graph_add_up_to_it() -> None:
    found = summary(network())
    known = stage_names(found)
    stages = graph_stages(found, known)
    assert set(known.values()) == {stage.name for stage in stages}
    assert sum(stage.macs for stage in stages) == found.cost.macs > 0
    assert sum(stage.weights for stage in stages) == found.cost.bytes_of_constants
    assert sum(stage.bytes_moved for stage in stages) == found.cost.bytes_moved
    unknown = graph_stages(found, {"elsewhere": "a", "nowhere": "b"})
    assert (unknown[0].macs, unknown[1].macs) == (found.cost.macs, 0), "what is not known belongs to what came before"
