"""Evidence from the first BatchNormalization, whose statistics are computed here, by numpy, from images that fit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import CalibrationTable
from edgewright.optimize.calibration_warnings import calibration_warnings
from edgewright.optimize.expected_images import Evidence, expectation_of, moments, preprocessing_evidence
from edgewright.runtime.preprocess import Preprocess
from textual_graphs import graph, normal

SIZE = 12
HALVES = Preprocess((SIZE, SIZE), None, (0.5,) * 3, (0.5,) * 3)
IMAGENET = Preprocess((SIZE, SIZE), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BYTES = Preprocess((SIZE, SIZE), None, (0.0,) * 3, (1 / 255,) * 3)


def pictures(count: int, seed: int = 1, channels: int = 3) -> NDArray[np.uint8]:
    """Warm pictures: more red than blue, as photographs have, `[N, H, W, C]`."""
    rng = np.random.default_rng(seed)
    brightness = rng.uniform(60, 160, (count, 1, 1, 1))
    tint = np.array([40, 0, -40])[:channels]
    return np.clip(rng.normal(brightness + tint, 40, (count, SIZE, SIZE, channels)), 0, 255).astype(np.uint8)


def network(preprocess: Preprocess, *, trained: bool = True) -> ir.Model:
    """A pointwise convolution and BatchNormalization, trained on other pictures behind `preprocess`."""
    channels = len(preprocess.mean)
    weight = normal("stem", 8, channels, 1, 1)
    reaching = np.einsum("oc,nchw->nohw", weight[..., 0, 0], preprocess.normalize(pictures(200, 2, channels)))
    mean, variance = reaching.mean(axis=(0, 2, 3)), reaching.var(axis=(0, 2, 3))
    if not trained:
        mean, variance = np.zeros(8), np.ones(8)
    return graph(
        "[stem] a = Conv (x, w) [norm] r = BatchNormalization (a, g, b, m, v) [relu] y = Relu (r)",
        f"float[N, {channels}, {SIZE}, {SIZE}] x",
        w=weight,
        g=np.ones(8, np.float32),
        b=np.zeros(8, np.float32),
        m=mean.astype(np.float32),
        v=variance.astype(np.float32),
    )


def test_the_distance_is_that_of_normal_distributions() -> None:
    expected = expectation_of(network(HALVES))
    assert expected is not None
    maps = normal("maps", 5, 8, 4, 4) * np.float32(2) + 1
    channels = maps.transpose(1, 0, 2, 3).reshape(8, -1).astype(np.float64)
    divergences = [
        np.log(np.sqrt(V) / np.sqrt(v + 1e-5)) + (v + 1e-5 + (m - M) ** 2) / (2 * V) - 0.5
        for m, v, M, V in zip(channels.mean(1), channels.var(1), expected.mean, expected.variance, strict=True)
    ]
    assert expected.distance(moments(maps)) == pytest.approx(np.mean(divergences), rel=1e-6)


def test_images_that_fit_are_left_in_peace() -> None:
    for preprocess in (HALVES, IMAGENET):
        for count in (1, 4, 16, 64):
            images = preprocess.normalize(pictures(count))
            assert preprocessing_evidence(network(preprocess), preprocess, images, threads=1).warning == ""


CASES = {
    "swapped": (HALVES, HALVES, True, "red and blue swapped (BGR)"),
    "another normalization": (HALVES, IMAGENET, False, "mean 0.5 and standard deviation 0.5"),
    "ImageNet's": (IMAGENET, HALVES, False, "ImageNet's mean and standard deviation"),
    "bytes": (BYTES, HALVES, False, "values 0 … 255"),
    "both": (BYTES, HALVES, True, "values 0 … 255, red and blue swapped (BGR)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_fits_better_is_named_with_both_distances(case: str) -> None:
    trained, given, swapped, words = CASES[case]
    pixels = pictures(64)
    images = given.normalize(pixels[..., ::-1] if swapped else pixels)
    evidence = preprocessing_evidence(network(trained), given, images, threads=1)
    assert evidence.warning.endswith(f" with {words}")
    assert "first normalization layer (norm)" in evidence.warning
    assert not evidence.fits


def test_nothing_is_said_without_evidence() -> None:
    images = IMAGENET.normalize(pictures(20))
    assert preprocessing_evidence(network(HALVES, trained=False), IMAGENET, images).distance is None
    plain = graph("[relu] y = Relu (x)", f"float[N, 3, {SIZE}, {SIZE}] x")
    assert preprocessing_evidence(plain, IMAGENET, images).distance is None
    assert preprocessing_evidence(None, IMAGENET, images) == Evidence()


UNLIKE = {
    "noise": np.random.default_rng(3).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8) // 200 * 255,
    "negatives": 255 - pictures(20),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_images_that_no_preparation_explains_are_called_unlike(kind: str) -> None:
    images, model = HALVES.normalize(UNLIKE[kind]), network(HALVES)
    evidence = preprocessing_evidence(model, HALVES, images, threads=1)
    assert evidence.distance is not None
    assert not evidence.fits
    assert evidence.warning == ""
    assert f"(norm) saw there is {evidence.distance:.2g}, and no usual preparation fits" in evidence.unexplained
    assert calibration_warnings(model, model, HALVES, images, CalibrationTable({}, 20, {}), given=20, threads=1) == (
        evidence.unexplained,
    )
    few = preprocessing_evidence(model, HALVES, images[:15], threads=1)  # which may be no fair sample
    assert (few.warning, few.unexplained) == ("", "")


def test_swapped_colours_are_seen_also_where_more_is_unlike() -> None:
    warm = pictures(64).astype(np.float64)
    pale = ((warm + 3 * warm.mean(axis=3, keepdims=True)) / 4).astype(np.uint8)
    right, swapped = (
        preprocessing_evidence(network(HALVES), HALVES, HALVES.normalize(images), threads=1)
        for images in (pale, np.ascontiguousarray(pale[..., ::-1]))
    )
    assert (right.warning, right.unexplained) == ("", "")
    assert swapped.warning.endswith("red and blue swapped (BGR)")
    assert not swapped.clear
    assert right.distance is not None
    assert swapped.distance is not None
    assert swapped.distance < 2 * right.distance


def test_images_that_are_a_little_unlike_are_left_in_peace() -> None:
    darker = preprocessing_evidence(network(HALVES), HALVES, HALVES.normalize(pictures(64) // 10 * 9), threads=1)
    assert darker.distance is not None
    assert 0.02 < darker.distance < 0.25
    assert (darker.warning, darker.unexplained) == ("", "")


def test_one_channel_has_no_colours_to_swap() -> None:
    grey = Preprocess((SIZE, SIZE), None, (0.5,), (0.5,), colour="L")
    images = grey.normalize(pictures(32, channels=1))
    assert preprocessing_evidence(network(grey), grey, images, threads=1).warning == ""
    bright = Preprocess((SIZE, SIZE), None, (0.0,), (1.0,), colour="L")
    evidence = preprocessing_evidence(network(grey), bright, bright.normalize(pictures(32, channels=1)), threads=1)
    assert evidence.warning.endswith("mean 0.5 and standard deviation 0.5")


def test_all_warnings_come_together() -> None:
    model = network(HALVES)
    images = HALVES.normalize(pictures(40))
    still = CalibrationTable({}, 40, {}, {"a": {2: 0.5}})
    black = np.full_like(images, -1.0)
    narrow, empty, same, grey, last = calibration_warnings(model, model, HALVES, black, still, given=40, threads=1)
    assert narrow.startswith("all pixels of 40 calibration images")
    assert empty.startswith("40 of 40 calibration images")
    assert same.startswith("all of 40 calibration images")
    assert grey.endswith("but the network takes colours")
    assert last.startswith("1 layer has constant channels over 40 images: stem (1 of 8)")
    assert calibration_warnings(model, model, HALVES, images, CalibrationTable({}, 40, {}), given=40, threads=1) == ()


def test_of_few_images_only_their_number_is_said() -> None:
    model = network(HALVES)
    table = CalibrationTable({}, 5, {}, {"a": {2: 0.5}})
    few = HALVES.normalize(pictures(5))
    (only,) = calibration_warnings(model, model, HALVES, few, table, given=5, threads=1)
    assert only.startswith("only 5 calibration images")
