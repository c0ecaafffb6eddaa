"""All that can be found out about calibration images before anything is calibrated with them.

Labels, where there are any, are counted and nothing else: no check looks whether a prediction is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewright.calibration.findings import NAMED, OK, PROBLEM, WARNING, Finding, worst
from edgewright.calibration.glimpse import Glimpse
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgewright.calibration.collect import CalibrationTable
    from edgewright.calibration.signatures import Signatures

__all__ = ["CalibrationCheck", "check_calibration"]

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many images are done, and how many there are."""
ORDER_SEED = 21
SHOWN = 64
"""Images whose fine structure is looked at."""


@dataclass(frozen=True)
class CalibrationCheck:
    """What was found, in the order of the checks.

    * images, evaluation: how many there are; evaluation is None without any
    """

    images: int
    evaluation: int | None
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst of all."""
        return worst(finding.verdict for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict,
            "images": self.images,
            "evaluation": self.evaluation,
            "checks": [finding.to_json() for finding in self.findings],
        }


def check_calibration(
    exported: ir.Model | None,
    folded: ir.Model,
    preprocess: Preprocess,
    labels: Sequence[str],
    images: ImageSet,
    evaluation: ImageSet | None = None,
    *,
    label_fault: str = "",
    method: str = "auto",
    threads: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> CalibrationCheck:
    """Of calibration `images` for a network with the classes `labels`, none if it gives no logits.

    * exported: the graph with batch normalization visible, None if it was never trained
    * folded: the one that is calibrated
    * evaluation: what will judge the engines, to be compared with `images`
    * label_fault: why the labels that `images` seem to have are not theirs
    * method: how the ranges will be chosen; threads: of onnxruntime, 0 for all cores

    Raises `DataError` if no image can be read, `CalibrationError` if an activation is not finite.
    """
    from edgewright.calibration.duplicates import duplicates, overlap
    from edgewright.calibration.outliers import outliers

    own = _signatures(images, preprocess, "hash calibration images", progress)
    judging = None if evaluation is None else _signatures(evaluation, preprocess, "hash evaluation images", progress)
    if not len(own.readable):
        raise DataError(
            f"none of {len(images)} calibration images can be read; the first: {own.unreadable[0]}", "give photographs"
        )
    different = own.different
    readable, watched = images.subset(own.readable), images.subset(own.readable[different])
    seen = _seen(folded, watched, preprocess, threads, progress)
    names = [own.name(position) for position in different]
    findings = [
        _files(own, judging),
        duplicates(own),
        *([] if judging is None else [overlap(own, judging)]),
        *([] if not labels else [_classes(readable, seen.logits, labels, label_fault)]),
        outliers(names, seen.contrasts, seen.magnitudes),
        _ranges(folded, seen.quarters, method),
        _preprocessing(exported, preprocess, readable, seen.glimpse, threads),
    ]
    return CalibrationCheck(len(images), None if evaluation is None else len(evaluation), tuple(findings))


@dataclass(frozen=True)
class _Seen:
    """What one pass of all images through the network left, in the order of the images.

    * quarters: tables of random quarters, as large as each other but for one image; fewer of fewer than four images
    * contrasts: `[N]`; logits: `[N, classes]`
    * magnitudes: of the largest value of each activation whose first axis are the images, `[N, T]`
    * glimpse: preprocessed images, `[K, C, H, W]`
    """

    quarters: tuple[CalibrationTable, ...]
    contrasts: NDArray[np.float64]
    magnitudes: NDArray[np.float32]
    logits: NDArray[np.float32]
    glimpse: NDArray[np.float32]


def _signatures(images: ImageSet, preprocess: Preprocess, what: str, progress: Progress) -> Signatures:
    from edgewright.calibration.signatures import signatures

    return signatures(images, preprocess, progress=lambda done: progress(what, done, len(images)))


def _seen(folded: ir.Model, images: ImageSet, preprocess: Preprocess, threads: int, progress: Progress) -> _Seen:
    """In a random order, so that the quarters are alike although folders are sorted by class."""
    from edgewright.calibration.collect import Tally, WatchedGraph, batch_size
    from edgewright.calibration.convergence import QUARTERS
    from edgewright.calibration.outliers import contrast

    order = np.random.default_rng(ORDER_SEED).permutation(len(images))
    parts = [order[quarter::QUARTERS] for quarter in range(min(QUARTERS, len(images)))]
    watched, size = WatchedGraph(folded, threads=threads), batch_size(folded)
    tallies = [Tally(watched.names) for _ in parts]
    (output,) = (str(value.name) for value in folded.graph.outputs)
    glimpse = Glimpse(len(images))
    contrasts, logits = [], []
    magnitudes: list[dict[str, NDArray[np.float32]]] = []
    done = 0
    stream = itertools.chain.from_iterable(batches(images.subset(part), preprocess, size) for part in parts)
    for batch in glimpse.watched(stream):
        tally = next(tally for tally, part in zip(tallies, parts, strict=True) if tally.samples < len(part))
        seen = watched(batch, done + 1)
        tally.add(seen)
        contrasts.append(contrast(batch, preprocess.std))
        magnitudes.append(_magnitudes(seen, len(batch)))
        logits.append(seen[output][0])
        done += len(batch)
        progress("watch activations", done, len(images))
    back = np.argsort(np.concatenate(parts))
    told = [name for name in magnitudes[0] if all(name in batch for batch in magnitudes)]
    columns = [_columns(batch, told, len(part)) for batch, part in zip(magnitudes, logits, strict=True)]
    return _Seen(
        tuple(tally.table({}) for tally in tallies),
        np.concatenate(contrasts)[back],
        np.concatenate(columns)[back],
        np.concatenate(logits)[back],
        glimpse.images,
    )


def _magnitudes(seen: Mapping[str, Any], images: int) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude of each activation in each image, `[N]`, by name.

    In an attention block the first axis may be heads or tokens of all images: these say nothing of one image.
    """
    return {
        name: np.maximum(np.abs(low).max(axis=1), np.abs(high).max(axis=1))
        for name, (low, high, _) in seen.items()
        if len(low) == images
    }


def _columns(magnitudes: Mapping[str, NDArray[np.float32]], names: Sequence[str], images: int) -> NDArray[np.float32]:
    """Of the activations with `names`, `[N, T]`."""
    rows = np.array([magnitudes[name] for name in names], np.float32)
    columns: NDArray[np.float32] = rows.reshape(len(names), images).T
    return columns


def _files(own: Signatures, judging: Signatures | None) -> Finding:
    """Whether all images can be read."""
    broken = [*own.unreadable.values(), *(() if judging is None else judging.unreadable.values())]
    total = len(own.names) + (0 if judging is None else len(judging.names))
    if not broken:
        return Finding("files", OK, (f"all {total:,} can be read",))
    return Finding(
        "files",
        PROBLEM,
        (f"{len(broken)} of {total:,} cannot be read: {'; '.join(broken[:NAMED])}",),
        "replace or remove them: calibration stops at the first",
        {"unreadable": broken},
    )


def _classes(images: ImageSet, logits: NDArray[np.float32], labels: Sequence[str], fault: str) -> Finding:
    from edgewright.calibration.coverage import coverage, predicted_coverage

    if images.labels is not None:
        return coverage(images.labels, labels)
    found = predicted_coverage(logits, labels)
    if not fault:
        return found
    remedy = "name the folders, or write labels.csv, as the network's classes; calibration itself needs no labels"
    return replace(
        found, verdict=WARNING, evidence=(f"the labels are not used: {fault}", *found.evidence), remedy=remedy
    )


def _ranges(folded: ir.Model, quarters: tuple[CalibrationTable, ...], method: str) -> Finding:
    from edgewright.calibration.convergence import convergence
    from edgewright.optimize.dialects import Quantizer

    return convergence(quarters, lambda table: Quantizer("cpu", folded, table, method=method).ranges)


def _preprocessing(
    exported: ir.Model | None, preprocess: Preprocess, images: ImageSet, glimpse: NDArray[np.float32], threads: int
) -> Finding:
    """What the pixels, their fine structure and the network's first normalization layer say."""
    from edgewright.calibration.aliasing import aliasing_evidence
    from edgewright.calibration.image_checks import set_warnings
    from edgewright.optimize.expected_images import preprocessing_evidence

    evidence = preprocessing_evidence(exported, preprocess, glimpse, threads=threads)
    share, aliased = aliasing_evidence(_pictures(images, preprocess))
    faults = set_warnings(glimpse, preprocess, grey_expected=evidence.fits)
    figures = {"distance": evidence.distance, "fine_share": share}
    unexplained = "" if faults else evidence.unexplained
    sentences = tuple(sentence for sentence in (evidence.warning, *faults, unexplained, aliased) if sentence)
    if sentences:
        return Finding(
            "preprocessing",
            PROBLEM if faults or evidence.clear else WARNING,
            sentences,
            "prepare the images as in training: --mean, --std, --resize, --interpolation; colours in the order RGB",
            figures,
        )
    fit = (
        "the network says nothing of its training images"
        if evidence.distance is None
        else f"distance from what the first normalization layer saw in training: {evidence.distance:.2g}"
    )
    fine = "" if share is None else f"; power at the highest by middle frequencies: {share:.2g}"
    return Finding("preprocessing", OK, (fit + fine,), "", figures)


def _pictures(images: ImageSet, preprocess: Preprocess) -> Iterator[NDArray[np.uint8]]:
    """Some of the images as the network sees them, or as they came if they are smaller."""
    for index in np.linspace(0, len(images) - 1, min(SHOWN, len(images))).astype(int):
        stored = preprocess.source_pixels(images[int(index)])
        shown = preprocess.pixels(images[int(index)])
        yield min(stored, shown, key=lambda pixels: min(pixels.shape[:2]))
