"""The rungs of the ladder: each makes another Quantizer of the one before it, or says why it has nothing to do.

They know nothing of what their candidates are worth; `ladder.py` measures that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.collect import CalibrationTable, batch_size, collect
from edgewright.optimize.absorb_bias import absorb_high_biases
from edgewright.optimize.correct_bias import bias_shifts
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.equalize import equalize
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import logits_of
from edgewright.runtime.errors import QuantizationError
from edgewright.runtime.parity import compare

__all__ = [
    "Attempted",
    "Finetune",
    "Ground",
    "Progress",
    "corrected",
    "equalized",
    "finetuned",
    "loosely_equalized",
    "rounded",
]

Batch = NDArray[np.float32]
LEAST_KEPT_DB = 20.0
"""Of a network that equalization changed, before it is quantized: INT8 has more to lose than that."""
FEW_IMAGES = 32
Progress = Callable[[int, int, str], None]
Attempted = tuple[Quantizer | None, str]
"""A rung's candidate, None if there is nothing for it to do, and what it did, or why not."""
Finetune = Callable[[Quantizer, Mapping[str, str], Progress], ir.Model]
"""Trains the folded FP32 graph of a Quantizer, with some layers left in float, for the Quantizer to write."""


@dataclass(frozen=True)
class Ground:
    """What every rung stands on, for all dialects of one network.

    * model: folded FP32; table: measured on `images`, float32 `[N, C, H, W]`
    * threads: of onnxruntime, 0 for all cores; seed: of what is learned
    * progress: is told (done, total, rung) while a rung takes its time
    """

    model: ir.Model
    table: CalibrationTable
    images: Batch
    threads: int
    seed: int
    progress: Progress
    finetune: Finetune | None = None
    _equalized: dict[bool, tuple[ir.Model, CalibrationTable | None, str]] = field(default_factory=dict)

    def told(self, rung: str) -> Callable[[int, int], None]:
        """`progress` for one rung."""
        return lambda done, total: self.progress(done, total, rung)

    def equalized(self, *, inexact: bool) -> tuple[ir.Model, CalibrationTable | None, str]:
        """The equalized graph, what was measured on it (None if it is the old graph), and what was done; made once."""
        if inexact not in self._equalized:
            self._equalized[inexact] = self._equalize(inexact=inexact)
        return self._equalized[inexact]

    def _equalize(self, *, inexact: bool) -> tuple[ir.Model, CalibrationTable | None, str]:
        result = equalize(self.model, inexact=inexact)
        if result.changed == (equalize(self.model).changed if inexact else 0):
            return self.model, None, "there is no pair of layers to equalize"
        if inexact and (kept := self._sqnr_db(result.model)) < LEAST_KEPT_DB:
            return self.model, None, f"it changes the network itself: SQNR {kept:.1f} dB"
        absorbed = absorb_high_biases(result.model, self.images, threads=self.threads)
        through = ", also through ReLU6 and SiLU" if inexact else ""
        biases = f", high biases of {absorbed.changed} layers absorbed" if absorbed.changed else ""
        note = f"{result.changed} pairs of layers equalized{through}{biases}"
        return absorbed.model, self._measured(absorbed.model), note

    def _sqnr_db(self, model: ir.Model) -> float:
        """Of the logits of another FP32 graph, on a few images."""
        few = self.images[:: max(1, len(self.images) // FEW_IMAGES)]
        logits = [logits_of(graph, few, threads=self.threads) for graph in (self.model, model)]
        return compare(logits[0], logits[1], None).sqnr_db or -math.inf

    def _measured(self, model: ir.Model) -> CalibrationTable:
        size = batch_size(model)
        return collect(
            model,
            (self.images[start : start + size] for start in range(0, len(self.images), size)),
            identity=self.table.identity,
            threads=self.threads,
            progress=lambda done: self.progress(done, len(self.images), "equalization"),
        )


def equalized(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
    """Cross-layer equalization where it changes nothing, and absorption of high biases."""
    return _with_equalized(ground, quantizer, inexact=False)


def loosely_equalized(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
    """The same through ReLU6 and SiLU too, where it changes the network itself."""
    return _with_equalized(ground, quantizer, inexact=True)


def _with_equalized(ground: Ground, quantizer: Quantizer, *, inexact: bool) -> Attempted:
    if quantizer.cache is not None:
        return None, "the ranges of a calibration cache are those of the network as it was"
    model, table, note = ground.equalized(inexact=inexact)
    return None if table is None else quantizer.for_network(model, table), note


def corrected(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
    """Empirical bias correction, measured without the shifts that may be there already."""
    bare = quantizer.repaired(replace(quantizer.repairs, bias_shifts={}))
    layers = [layer for layer in bare.layers if layer not in left_out]
    shifts = bias_shifts(
        bare.model,
        bare.runnable(left_out),
        layers,
        ground.images,
        threads=ground.threads,
        progress=ground.told("bias correction"),
    )
    note = f"mean shifts of {len(shifts)} layers taken out of their biases"
    return (bare.repaired(replace(bare.repairs, bias_shifts=shifts)) if shifts else None), note


def rounded(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
    """AdaRound; the biases are corrected behind it once more."""
    from edgewright.learned.adaround import AdaRoundSettings, learned_integers
    from edgewright.learned.numerics import numerics

    bare = quantizer.repaired(Repairs())
    with numerics(ground.threads):
        integers = learned_integers(
            bare.model,
            bare.runnable(left_out),
            [layer for layer in bare.layers if layer not in left_out],
            ground.images,
            settings=AdaRoundSettings(seed=ground.seed),
            threads=ground.threads,
            progress=ground.told("AdaRound"),
        )
    if not integers:
        return None, "no rounding was better than the nearest"
    learned = bare.repaired(Repairs(integers=integers))
    return corrected(ground, learned, left_out)[0] or learned, f"rounding of {len(integers)} layers learned"


def finetuned(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
    """Quantization-aware fine-tuning, if it was asked for."""
    if ground.finetune is None:
        return None, "not asked for"
    try:
        trained = ground.finetune(quantizer, left_out, ground.progress)
    except QuantizationError as error:  # the other rungs are still there
        return None, error.message
    return quantizer.for_network(trained, quantizer.table), "weights trained with fake quantization"
