"""Do the ranges still move with more images? What ranges of fewer images would cost says what more may bring.

The images are divided at random into four quarters. Ranges of a quarter, of a half and of all are chosen by the same
method as later. The **cost** of a range of fewer images is the mean squared quantization error that it makes on all
images, by that of the range of all, in decibels: a range may move far where the error is flat, and that costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce

import numpy as np

from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.ranges import Range, squared_error

from .findings import OK, PROBLEM, WARNING, Finding
from .image_checks import FEWEST_IMAGES, too_few_warning, unseen_share

__all__ = ["QUARTERS", "Doubling", "convergence", "doublings", "images_to_add", "merged"]

Chooser = Callable[[CalibrationTable], Mapping[str, Range]]
"""The ranges of the activations that will be quantized."""

QUARTERS = 4
ENOUGH_DB = 0.2
"""Mean over the activations.

On EfficientNet-Lite0, 500 photographs in three random orders, doublings to 16, 32, 64, 128, 256 save 0.9, 0.3 to 0.5,
0.15 to 0.24, 0.07 to 0.13 and 0.05 to 0.11 dB. The SQNR of INT8 logits of the 244 others rises by at most 0.5 dB
from 16 images to 256, and by at most 0.1 from where this limit is met. On EfficientNet-B0 (Fashion-MNIST) doublings to
16, 32, 64, 128, 256 images save 1.6, 0.8, 0.5, 0.3, 0.1 dB; logits of 1,000 other images have 21.5, 20.6, 20.1, 24.0,
23.8 dB.
"""
SLOWEST, FASTEST = 0.5, 2.0
"""Exponents by which the cost may fall with the number of images: where an error falls like 1/√n, its square falls like
1/n; with heavy tails it falls more slowly."""
MOST_TIMES = 16
"""An extrapolation further than four doublings is not worth a number."""


@dataclass(frozen=True)
class Doubling:
    """What half of the images would have changed.

    * images: from how many to how many
    * moved: how far the ends of the ranges moved by the doubling, by their width; the mean over the activations
    * cost_db: of the ranges of the fewer images on all images; the mean over the activations
    * worst, worst_db: the activation with the largest cost, and that
    """

    images: tuple[int, int]
    moved: float
    cost_db: float
    worst: str
    worst_db: float


def merged(tables: Sequence[CalibrationTable]) -> CalibrationTable:
    """One table of disjoint images of the same graph."""

    def both(one: CalibrationTable, other: CalibrationTable) -> CalibrationTable:
        histograms = {name: seen.merged(other.histograms[name]) for name, seen in one.histograms.items()}
        return replace(one, samples=one.samples + other.samples, histograms=histograms)

    return reduce(both, tables)


def doublings(quarters: Sequence[CalibrationTable], ranges_of: Chooser) -> tuple[Doubling, Doubling]:
    """From a quarter to a half and from a half to all, each the mean over the quarters or halves."""
    halves = [merged(quarters[:2]), merged(quarters[2:])]
    whole = merged(halves)
    final = ranges_of(whole)
    of_halves = [ranges_of(half) for half in halves]
    of_quarters = [ranges_of(quarter) for quarter in quarters]
    first = _doubling(quarters, of_quarters, [half for half in of_halves for _ in range(2)], whole, final)
    last = _doubling(halves, of_halves, [final, final], whole, final)
    return replace(first, images=(quarters[0].samples, halves[0].samples)), replace(
        last, images=(halves[0].samples, whole.samples)
    )


def images_to_add(first: Doubling, last: Doubling) -> int | None:
    """How many more images bring the cost of a doubling below 0.2 dB; 0: none; None: more than can be told.

    A power law through both costs, cost = c · n^−a, as learning curves of classifiers are extrapolated (Cortes et al.
    1993, "Learning Curves: Asymptotic Values and Rate of Convergence"), with a from 0.5 to 2. Two points say little
    about a: where 190 images are enough, 16 to 128 images foretell 96, 112, 154, 188.
    """
    if last.cost_db <= ENOUGH_DB:
        return 0
    images = last.images[1]
    steepness = math.log2(first.cost_db / last.cost_db) if first.cost_db > 0 else SLOWEST
    times = (last.cost_db / ENOUGH_DB) ** (1 / min(FASTEST, max(SLOWEST, steepness)))
    return None if times > MOST_TIMES else _rounded(images * (times - 1))


def convergence(quarters: Sequence[CalibrationTable], ranges_of: Chooser) -> Finding:
    """Whether there are images enough for the ranges; `quarters` are four tables of as many images each."""
    images = sum(table.samples for table in quarters)
    if images < FEWEST_IMAGES or len(quarters) < QUARTERS:
        return Finding(
            "ranges",
            PROBLEM,
            (too_few_warning(images),),
            f"add at least {FEWEST_IMAGES - images} images",
            {"images": images, "enough": False, "add": FEWEST_IMAGES - images, "doublings": []},
        )
    first, last = doublings(quarters, ranges_of)
    add = images_to_add(first, last)
    figures = {"images": images, "enough": add == 0, "add": add, "doublings": [asdict(first), asdict(last)]}
    evidence = (
        *(_sentence(doubling) for doubling in (first, last)),
        f"at most {100 * unseen_share(images):.1f} % of new images exceed the largest value seen of an activation",
    )
    if add == 0:
        return Finding("ranges", OK, (f"{images:,} images are enough: below {ENOUGH_DB} dB", *evidence), "", figures)
    wish = f"more than {_rounded(images * (MOST_TIMES - 1)):,}" if add is None else f"about {add:,}"
    return Finding("ranges", WARNING, evidence, f"add {wish} images", figures)


def _doubling(
    tables: Sequence[CalibrationTable],
    fewer: Sequence[Mapping[str, Range]],
    more: Sequence[Mapping[str, Range]],
    whole: CalibrationTable,
    final: Mapping[str, Range],
) -> Doubling:
    names = [name for name, interval in final.items() if interval.high > interval.low]
    moved = [[_moved(less[name], most[name]) for name in names] for less, most in zip(fewer, more, strict=True)]
    costs = np.array([[_cost_db(whole, name, less[name], final[name]) for name in names] for less in fewer])
    if not names:
        return Doubling((0, 0), 0.0, 0.0, "", 0.0)
    by_activation = costs.mean(axis=0)
    worst = int(by_activation.argmax())
    return Doubling(
        (0, 0), float(np.mean(moved)), float(by_activation.mean()), names[worst], float(by_activation[worst])
    )


def _moved(fewer: Range, more: Range) -> float:
    width = more.high - more.low
    return max(abs(more.high - fewer.high), abs(more.low - fewer.low)) / width if width else 0.0


def _cost_db(table: CalibrationTable, name: str, interval: Range, final: Range) -> float:
    """How much larger the error of `interval` on all images is than that of their own range, in decibels.

    Below 0 where a range of fewer images happens to err less than the one that was chosen: nothing is lost.
    """
    values, counts = table.histograms[name].occupied()
    own, other = (squared_error(values, counts, each) for each in (final, interval))
    return max(0.0, 10 * math.log10(other / own)) if own > 0 and other > 0 else 0.0


def _sentence(doubling: Doubling) -> str:
    fewer, more = doubling.images
    return (
        f"{fewer:,} → {more:,} images: ranges move by {100 * doubling.moved:.1f} % of their width, which saves "
        f"{doubling.cost_db:.2f} dB of error, most in {doubling.worst} ({doubling.worst_db:.1f})"
    )


def _rounded(images: float) -> int:
    """Up to one significant digit, as exact as the estimate is."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, images))))
    return int(math.ceil(images / unit) * unit)
