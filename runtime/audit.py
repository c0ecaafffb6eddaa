"""The audit: which precision each planned layer really runs in, and what the engine moves.

A plan says what each convolution and matrix product is to run in; the kernels that a backend lists say what was built.
Work is counted in multiply-accumulates (MACs), so that a large layer weighs more than a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .specs import Kernel, LayerPrecision, PlannedLayer

__all__ = ["MISSING", "Traffic", "audited", "deviations", "in_words", "shares_of_work", "traffic"]

MISSING = "missing"
"""The actual precision of a layer that no kernel claims."""

WIDENING = ("int8", "fp16", "bf16", "fp32")
"""Precisions, the narrowest first; any other counts as wider."""


@dataclass(frozen=True)
class Traffic:
    """What one run at batch 1 costs apart from arithmetic: launches, and bytes that kernels read and write."""

    kernels: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def at_most(self, other: Traffic) -> bool:
        """Whether this needs neither more launches nor more bytes than `other`."""
        return self.kernels <= other.kernels and self.bytes_moved <= other.bytes_moved


def audited(planned: Iterable[PlannedLayer], kernels: Sequence[Kernel]) -> tuple[LayerPrecision, ...]:
    """Each planned layer with the precision of the kernel that runs it.

    A compiler may spread a layer over several kernels, as when a convolution's bias is added in front of the next
    quantization; then the one that computes the products counts, and of two such the wider.
    """
    running: dict[str, Kernel] = {}
    for kernel in sorted(kernels, key=_precedence):
        running.update(dict.fromkeys(kernel.sources, kernel))
    layers = []
    for layer in planned:
        found = running.get(layer.name)
        actual, name = (found.precision, found.name) if found is not None else (MISSING, "")
        layers.append(LayerPrecision(layer.name, layer.operator, layer.precision, actual, layer.macs, name))
    return tuple(layers)


def _precedence(kernel: Kernel) -> tuple[bool, int]:
    """What counts more comes later."""
    return kernel.computes, WIDENING.index(kernel.precision) if kernel.precision in WIDENING else len(WIDENING)


def shares_of_work(layers: Sequence[LayerPrecision], precision: str) -> tuple[float, float]:
    """The shares of all MACs, 0…1, that were planned for `precision` and that really run in it; 0 without any layer."""
    total = sum(layer.macs for layer in layers) or 1
    planned = sum(layer.macs for layer in layers if layer.requested == precision)
    return planned / total, sum(layer.macs for layer in layers if layer.actual == precision) / total


def deviations(layers: Iterable[LayerPrecision]) -> tuple[LayerPrecision, ...]:
    """The layers that do not run in what was planned for them, those with the most work first."""
    return tuple(sorted((layer for layer in layers if layer.actual != layer.requested), key=lambda layer: -layer.macs))


def traffic(kernels: Sequence[Kernel]) -> Traffic | None:
    """The sum over all kernels; None if the backend does not say what each of them reads and writes."""
    read = [kernel.bytes_read for kernel in kernels if kernel.bytes_read is not None]
    written = [kernel.bytes_written for kernel in kernels if kernel.bytes_written is not None]
    if not kernels or len(read) < len(kernels) or len(written) < len(kernels):
        return None
    return Traffic(len(kernels), sum(read), sum(written))


def in_words(traffic: Traffic) -> str:
    """Such as "52 kernels and 28.8 MB"."""
    return f"{traffic.kernels} kernels and {traffic.bytes_moved / 1e6:.1f} MB"
