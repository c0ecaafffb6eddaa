"""Networks whose channels were rescaled by up to 100×: what plain INT8 loses on them, and what the ladder does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from figures import Figure
from numpy.typing import NDArray
from quantizers import calibrated
from stress_networks import INPUT_SHAPE, NETWORKS, PREPROCESS, rescaled, trained

from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.export.to_onnx import export_onnx
from edgewright.ladder import Aim, CalibrationImages, Ladder
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.segments import logits_of
from edgewright.runtime.parity import Parity, compare

DIALECTS = ("cpu", "tensorrt", "rtx")
LOSS_OF_PLAIN = 5.0
LOSS_OF_LADDER = 0.5

Batch = NDArray[np.float32]


def measure() -> Iterator[Figure]:
    """Losses on the 10,000 test images, in points: of min-max, of ranges chosen per tensor, of the ladder."""
    calibration, test = _preprocessed(fashion_mnist_calibration()), fashion_mnist_test()
    images, labels = _preprocessed(test), test.labels
    assert labels is not None
    worst = 0.0
    for name in NETWORKS:
        folded = rescaled_graph(name)
        reference = logits_of(folded, images)
        shown = CalibrationImages.divided(calibration)
        table = calibrated(folded, shown.choosing)
        ladder = Ladder(folded, table, shown, Aim())
        yield Figure(f"{name} FP32 top-1 on 10,000 images", 100 * _top1(reference, labels), "%", 88.0, at_least=True)
        for dialect in DIALECTS:
            for words, method in (("min-max", "minmax"), ("ranges chosen per tensor", "auto")):
                plain = Quantizer(dialect, folded, table, method=method)
                parity = compare(reference, logits_of(plain.runnable(), images), labels)
                yield Figure(
                    f"{name} INT8 loss, {dialect}, {words}", 100 * parity.loss, "points", note=_interval(parity)
                )
                worst = max(worst, 100 * parity.loss)
            climb = ladder.climb(dialect)
            parity = compare(reference, logits_of(climb.quantizer.runnable(climb.left_out), images), labels)
            taken = ", ".join(rung.name for rung in climb.rungs if rung.taken)
            layers = len(climb.quantizer.layers)
            note = f"{_interval(parity)}; {taken}; {layers - len(climb.left_out)} of {layers} layers INT8"
            yield Figure(f"{name} INT8 loss, {dialect}, ladder", 100 * parity.loss, "points", LOSS_OF_LADDER, note=note)
    yield Figure("stress set, largest loss without the ladder", worst, "points", LOSS_OF_PLAIN, at_least=True)


def rescaled_graph(name: str) -> ir.Model:
    """The folded FP32 graph of network `name` after rescaling."""
    exported = export_onnx(rescaled(trained(name)), INPUT_SHAPE)
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(exported))).model


def _preprocessed(image_set: ImageSet) -> Batch:
    return np.concatenate(list(batches(image_set, PREPROCESS, 64)))


def _top1(logits: Batch, labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _interval(parity: Parity) -> str:
    low, high = parity.loss_ci95
    return f"95 % interval {100 * low:.2f} … {100 * high:.2f}"
