"""Everything that a person should know about the calibration images of a run, in sentences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.image_checks import image_warnings, too_few_warning
from edgewright.optimize.dead_channels import dead_channel_warning, still_channels
from edgewright.optimize.expected_images import preprocessing_evidence
from edgewright.runtime.preprocess import Preprocess

__all__ = ["calibration_warnings"]


def calibration_warnings(
    exported: ir.Model | None,
    folded: ir.Model,
    preprocess: Preprocess,
    images: NDArray[np.float32],
    table: CalibrationTable,
    *,
    given: int,
    threads: int = 0,
) -> tuple[str, ...]:
    """Sentences, none for images that nothing can be said against.

    * exported: the graph with batch normalization visible, None if it was never trained
    * folded: the one that was calibrated, which `table` is of
    * given: how many calibration images there are; of those that ranges come from, a quarter less, `table` knows
    * images: some of the calibration images, preprocessed, `[N, C, H, W]`, N at least 1; see `calibration/glimpse.py`
    """
    evidence = preprocessing_evidence(exported, preprocess, images, threads=threads)
    faults = image_warnings(images, preprocess, grey_expected=evidence.fits)
    warnings = (
        too_few_warning(given),
        *faults,
        evidence.warning,
        "" if faults else evidence.unexplained,
        dead_channel_warning(still_channels(folded, table), table.samples),
    )
    return tuple(warning for warning in warnings if warning)
