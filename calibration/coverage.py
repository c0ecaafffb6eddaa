"""Which classes of the network the calibration images show: those that never appear never move a range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .findings import OK, WARNING, Finding, named

__all__ = ["coverage", "predicted_coverage"]

FEW = 0.2
"""Of the images that a class would have if all had equally many: below, it has few."""


def coverage(classes: NDArray[np.int64], labels: Sequence[str]) -> Finding:
    """Of images in folders or lists of `classes` `[N]`, of a network with the classes `labels`.

    A class is missing only where there are images enough for all: 250 images cannot show 1,000 classes.
    """
    counts = np.bincount(classes, minlength=len(labels))
    seen = int((counts > 0).sum())
    figures = {"source": "labels", "classes": len(labels), "seen": seen, "counts": counts.tolist()}
    fact = f"{len(classes):,} images of {seen:,} of the {len(labels):,} classes"
    if len(classes) < len(labels):
        return Finding("classes", OK, (f"{fact}: too few images to show all",), "", figures)
    missing = [labels[index] for index in np.flatnonzero(counts == 0).tolist()]
    few = [
        f"{labels[index]} ({counts[index]})"
        for index in np.flatnonzero((counts > 0) & (counts < FEW * len(classes) / len(labels))).tolist()
    ]
    evidence = [fact]
    evidence += [f"no image of {_are(missing)}: {named(missing)}"] if missing else []
    evidence += [f"few images of {_are(few)}: {named(few)}"] if few else []
    if len(evidence) == 1:
        return Finding("classes", OK, (fact,), "", figures)
    figures |= {"missing": missing, "few": few}
    return Finding("classes", WARNING, tuple(evidence), "add images of them, about as many as of the others", figures)


def predicted_coverage(logits: NDArray[np.float32], labels: Sequence[str]) -> Finding:
    """The same of images without labels, by the classes that the network itself predicts, `logits` `[N, classes]`.

    A wrong prediction counts for a wrong class, so a class without a prediction may be there.
    """
    counts = np.bincount(logits.argmax(axis=1), minlength=len(labels))
    seen, images = int((counts > 0).sum()), len(logits)
    most = int(counts.argmax())
    fact = f"no labels; the network predicts {seen:,} of its {len(labels):,} classes for {images:,} images"
    figures = {"source": "predictions", "classes": len(labels), "seen": seen, "counts": counts.tolist()}
    missing = [labels[index] for index in np.flatnonzero(counts == 0).tolist()]
    if images < len(labels) or not missing:
        one = len(labels) > 1 and images > 1 and seen == 1
        if one:
            return Finding(
                "classes",
                WARNING,
                (fact, f"all are predicted as {labels[most]}"),
                "give images of other classes too, or look whether the preprocessing is right",
                figures,
            )
        return Finding("classes", OK, (fact,), "", figures)
    return Finding(
        "classes",
        WARNING,
        (fact, f"none is predicted as {named(missing)}"),
        "add images of these classes if there are none",
        figures | {"missing": missing},
    )


def _are(classes: Sequence[str]) -> str:
    return "1 class" if len(classes) == 1 else f"{len(classes)} classes"
