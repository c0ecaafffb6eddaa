"""From the names that a library gives its kernels to the planned layers that they run."""

from __future__ import annotations

from collections.abc import Iterable

from ..specs import PlannedLayer

__all__ = ["layer_run_by"]

FUSED = "fused "  # onnxruntime's "fused 1/Gemm" is a Gemm with its activation
ENDINGS = ("_", "/", "::")
"""What sets a library's own ending apart from the name of the node or tensor before it."""


def layer_run_by(
    kernel: str, planned: Iterable[PlannedLayer], *, endings: tuple[str, ...] = ENDINGS
) -> tuple[str, ...]:
    """The planned layer that a kernel runs, as a tuple of one, or of none.

    A library calls a kernel after a node or tensor of the graph, often with an ending of its own, which begins with one
    of `endings`: onnxruntime's "features.0.2/Clip_nchwc" is a convolution with its Clip, OpenVINO's
    "fc/Gemm/WithoutBiases" a Gemm. Of several names that fit, the longest counts.
    """
    kernel = kernel.removeprefix(FUSED)
    fitting = [
        (len(name), layer.name)
        for layer in planned
        for name in (layer.name, *layer.aliases)
        if kernel == name or kernel.startswith(tuple(name + ending for ending in endings))
    ]
    return (max(fitting)[1],) if fitting else ()
