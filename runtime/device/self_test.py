"""The self-test: does an engine give the reference's logits on the golden inputs, on this device?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..backends.runner import Runner
from ..bundle.spec import Limits
from ..latency import measure_interleaved
from ..parity import Parity, compare
from ..specs import EngineInfo
from .kept import SelfTest

__all__ = ["self_tested"]

USUAL_BATCH = 16
TIMED_SECONDS, LEAST_RUNS, MOST_RUNS = 0.3, 5, 200


def self_tested(
    runner: Runner,
    info: EngineInfo,
    pixels: NDArray[np.uint8],
    reference: NDArray[np.float32],
    limits: Limits,
) -> SelfTest:
    """Runs the golden images through the engine and judges its logits.

    * pixels: uint8 `[images, H, W, C]`, resized and cropped; reference: logits, float32 `[images, classes]`

    Raises `EngineError` if it does not run, `ParityError` if its logits have another shape.
    """
    images = info.preprocess.normalize(pixels)
    smallest, largest = _batches(info)
    parity = compare(reference, _logits(runner, images, smallest, max(smallest, min(largest, USUAL_BATCH))), None)
    failures = _failures(parity, limits)
    latency = measure_interleaved(
        {"engine": lambda: _run(runner, _padded(images[:smallest], smallest))},
        batch=smallest,
        threads=0,
        budget_seconds=TIMED_SECONDS,
        min_runs=LEAST_RUNS,
        max_runs=MOST_RUNS,
    )["engine"]
    return SelfTest(
        images=parity.images,
        sqnr_db=parity.sqnr_db,
        agreement=parity.agreement,
        max_abs=parity.max_abs,
        limits=limits,
        passed=not failures,
        reason="; ".join(failures) or f"{_decibels(parity)}, top-1 agrees on {_share(parity.agreement)} of the images",
        latency_ms=latency.p50,
    )


def _batches(info: EngineInfo) -> tuple[int, int]:
    """The smallest and the largest batch that the engine takes."""
    fixed = info.inputs[0].shape[0]
    if fixed is not None:
        return fixed, fixed
    return (1, USUAL_BATCH) if info.profile is None else (info.profile.minimum, info.profile.maximum)


def _logits(runner: Runner, images: NDArray[np.float32], smallest: int, step: int) -> NDArray[np.float32]:
    """Float32 `[images, classes]`; the last batch is filled up to what the engine takes."""
    parts = [images[start : start + step] for start in range(0, len(images), step)]
    return np.concatenate([_run(runner, _padded(part, smallest))[: len(part)] for part in parts])


def _padded(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    missing = max(0, size - len(images))
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images


def _run(runner: Runner, images: NDArray[np.float32]) -> NDArray[np.float32]:
    (logits,) = runner.infer({runner.inputs[0].name: images}).values()
    return logits


def _failures(parity: Parity, limits: Limits) -> list[str]:
    """What is beyond the limits, in words; empty if nothing is."""
    failures = []
    if parity.nonfinite:
        failures.append(f"{parity.nonfinite} of {parity.images} images give logits that are not finite")
    if parity.sqnr_db is None or not parity.sqnr_db >= limits.sqnr_db:
        failures.append(f"the logits have {_decibels(parity)}, at least {limits.sqnr_db:.1f} dB are needed")
    if not parity.agreement >= limits.agreement:
        failures.append(
            f"top-1 agrees on {_share(parity.agreement)} of the images, needed are {_share(limits.agreement)}"
        )
    return failures


def _decibels(parity: Parity) -> str:
    return "no SQNR" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB SQNR"


def _share(share: float) -> str:
    return f"{100 * share:.4g} %"
