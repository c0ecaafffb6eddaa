"""Expected flips and their loss on synthetic logits: the answer is known from the normal distribution or by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from edgewright.optimize.expected_flips import NEIGHBOURS, ExpectedFlips, expected_flips
from edgewright.runtime.errors import ParityError

Array = NDArray[Any]


def loss(reference: Array, logits: Array) -> float:
    return expected_flips(reference, logits).loss


def two_classes(margins: Array) -> Array:
    """Logits of two classes that are `margins` apart, either one ahead."""
    signs = np.where(np.arange(len(margins)) % 2, 1.0, -1.0)
    return np.stack([signs * margins / 2, -signs * margins / 2], axis=1)


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.1, 0.15), (0.5, 0.05), (2.0, 0.02)])
def test_gaussian_errors_on_known_margins(sigma: float, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    margins = rng.gamma(2.0, 1.0, 50_000)
    reference = two_classes(margins)
    found = expected_flips(reference, reference + rng.normal(scale=sigma, size=reference.shape))
    # the difference of two errors has standard deviation √2·σ; a flip costs softmax's difference, tanh(margin / 2)
    flips = norm.cdf(-margins / (np.sqrt(2) * sigma))
    assert found.loss == pytest.approx((flips * np.tanh(margins / 2)).mean(), rel=tolerance)
    assert found.share == pytest.approx(flips.mean(), rel=tolerance)


def test_exchanged_errors_scatter_less_than_those_of_each_image_alone() -> None:
    sigma, images = 0.1, 384
    margins = np.linspace(0.0, 8.0, images)
    reference = two_classes(margins)
    expected = (norm.cdf(-margins / (np.sqrt(2) * sigma)) * np.tanh(margins / 2)).mean()
    rng = np.random.default_rng(1)
    candidates = [reference + rng.normal(scale=sigma, size=(images, 2)) for _ in range(60)]
    found = [loss(reference, candidate) for candidate in candidates]
    shares = [expected_flips(reference, candidate).share for candidate in candidates]
    counted = [(candidate.argmax(axis=1) != reference.argmax(axis=1)).mean() for candidate in candidates]
    alone = [
        ((candidate.argmax(axis=1) != reference.argmax(axis=1)) * np.tanh(margins / 2)).mean()
        for candidate in candidates
    ]
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
    assert np.std(found) < 0.8 * np.std(alone)
    assert np.mean(shares) == pytest.approx(np.mean(counted), rel=0.1)
    assert np.std(shares) < 0.8 * np.std(counted)


def test_hard_images_meet_the_errors_of_hard_ones() -> None:
    rng = np.random.default_rng(6)
    margins = rng.gamma(2.0, 1.0, 5_000)
    reference, sigma = two_classes(margins), np.where(margins < 0.5, 1.0, 0.01)
    found = loss(reference, reference + sigma[:, None] * rng.normal(size=reference.shape))
    expected = (norm.cdf(-margins / (np.sqrt(2) * sigma)) * np.tanh(margins / 2)).mean()
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_error_on_the_first_class_of_one_image_is_one_on_the_first_class_of_another(sign: float) -> None:
    margins = np.random.default_rng(7).gamma(2.0, 1.0, 500)
    reference = two_classes(margins)
    first = reference == reference.max(axis=1, keepdims=True)
    found = loss(reference, reference - sign * first)  # the first class of each is lowered, or raised, by 1
    assert found == pytest.approx((np.tanh(margins / 2) * (margins < sign)).mean())


def test_it_is_the_accuracy_that_is_lost_where_the_reference_is_calibrated() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(scale=2.0, size=(10_000, 10))
    quantized = reference + rng.normal(scale=0.5, size=reference.shape)
    labels = (reference + rng.gumbel(size=(10, 10_000, 10))).argmax(axis=2)  # softmax's (the Gumbel-max trick)
    lost = (reference.argmax(axis=1) == labels).mean() - (quantized.argmax(axis=1) == labels).mean()
    assert lost > 0.01
    assert loss(reference, quantized) == pytest.approx(lost, abs=0.003)


def test_by_hand_with_two_images() -> None:
    reference = np.log([[0.6, 0.4], [0.2, 0.8]])
    quantized = reference + np.diag([-0.5, -0.1])  # the first error flips the first image, no other pair does
    # of the four pairs of an image and an error only (0, 0) loses 0.6 − 0.4
    found = expected_flips(reference, quantized)
    assert (found.share, found.loss) == pytest.approx((1 / 4, 0.2 / 4))


def test_what_flips_nothing_costs_nothing() -> None:
    rng = np.random.default_rng(3)
    reference = np.sort(np.arange(10.0) + rng.uniform(0, 0.5, (100, 10)), axis=1)
    nothing = ExpectedFlips(0.0, 0.0)
    assert expected_flips(reference, reference) == nothing
    assert expected_flips(reference, reference + rng.uniform(-0.2, 0.2, reference.shape)) == nothing
    assert expected_flips(reference, reference + rng.normal(size=(100, 1)) * 50) == nothing  # the same for every class


def test_it_grows_with_the_error_up_to_chance() -> None:
    rng = np.random.default_rng(4)
    reference, error = rng.normal(scale=3.0, size=(500, 10)), rng.normal(size=(500, 10))
    losses = [loss(reference, reference + scale * error) for scale in (0.1, 0.3, 1.0, 3.0, 1e4)]
    assert losses == sorted(losses)
    belief = np.exp(reference) / np.exp(reference).sum(axis=1, keepdims=True)
    assert losses[-1] == pytest.approx(belief.max(axis=1).mean() - 0.1, abs=0.02)


def test_an_image_whose_logits_are_not_finite_is_lost() -> None:
    reference = np.log([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    quantized = reference.copy()
    quantized[1, 0] = np.nan
    quantized[2, 0] = np.inf
    found = expected_flips(reference, quantized)
    assert (found.share, found.loss) == pytest.approx((2 / 3, (0.8 + 0.9) / 3))
    assert loss(reference, np.full_like(reference, np.nan)) == pytest.approx((0.6 + 0.8 + 0.9) / 3)


def test_huge_logits_do_not_overflow() -> None:
    reference = np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)
    assert loss(reference, -reference) == pytest.approx(1.0)


@pytest.mark.parametrize("images", [1, 2, NEIGHBOURS, 2 * NEIGHBOURS + 1])
def test_few_images_all_exchange_their_errors(images: int) -> None:
    rng = np.random.default_rng(5)
    reference = -np.sort(-rng.normal(size=(images, 4)), axis=1)
    errors = rng.normal(size=reference.shape)
    belief = np.exp(reference) / np.exp(reference).sum(axis=1, keepdims=True)
    answers = [(i, int((reference[i] + error).argmax())) for i in range(images) for error in errors]
    shuffled = rng.permutation(4)  # the order of the classes says nothing, nor does that of the images
    found = expected_flips(reference[::-1, shuffled], (reference + errors)[::-1, shuffled])
    assert found.loss == pytest.approx(np.mean([belief[i, 0] - belief[i, answer] for i, answer in answers]))
    assert found.share == pytest.approx(np.mean([answer != 0 for _, answer in answers]))


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (4,), (0, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParityError, match=r"expected the same twice"):
        loss(np.zeros((4, 2) if shape != (0, 2) else shape), np.zeros(shape))
