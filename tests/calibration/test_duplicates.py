"""Copies are recognized, other pictures are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from edgewright.calibration.datasets import image_folder
from edgewright.calibration.duplicates import duplicates, near_distance, overlap, twins_between, twins_within
from edgewright.calibration.fashion_mnist import fashion_mnist_calibration
from edgewright.calibration.findings import OK, PROBLEM, WARNING
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.signatures import Signatures, signatures
from edgewright.runtime.preprocess import Preprocess
from photographs import photographs

COLOUR = Preprocess((64, 64), None, (0.5,) * 3, (0.5,) * 3)
GREY = Preprocess((28, 28), None, (0.5,), (0.5,), colour="L")
COUNT = 24


def of(pictures: NDArray[np.uint8], name: str = "set", preprocess: Preprocess = COLOUR) -> Signatures:
    return signatures(ImageSet.from_array(name, pictures), preprocess)


def of_pictures(folder: Path, pictures: list[Image.Image]) -> Signatures:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:02}.png")
    return signatures(image_folder(folder), COLOUR)


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=40)
    return Image.open(stream).convert("RGB")


def cropped(picture: Image.Image) -> Image.Image:
    return picture.crop((2, 2, picture.width - 2, picture.height - 1))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": jpeg,
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "square": lambda picture: picture.resize((80, 80)),
    "cropped": cropped,
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "all": lambda picture: ImageEnhance.Brightness(jpeg(cropped(picture).resize((100, 75)))).enhance(0.8),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_changed_copy_is_near_its_original_and_no_other(change: str, tmp_path: Path) -> None:
    originals = photographs(COUNT)
    copies = of_pictures(tmp_path / "copies", [COPIES[change](Image.fromarray(each)) for each in originals])
    known = of(originals)
    found = twins_between(copies, known, near_distance(known.looks))
    assert [twins.image for twins in found] == [f"{index:02}.png" for index in range(COUNT)]
    assert [twins.twin for twins in found] == [f"set image {index}" for index in range(COUNT)]
    assert not any(twins.equal for twins in found)


def test_other_pictures_are_not_near() -> None:
    pictures, others = photographs(COUNT), photographs(COUNT, seed=2)
    assert duplicates(of(pictures)).verdict == OK
    assert overlap(of(pictures), of(others)).verdict == OK
    assert overlap(of(pictures), of(pictures[:, :, ::-1].copy())).verdict == OK, "mirrored is another picture"


def test_equal_pixels_are_equal_in_any_file(tmp_path: Path) -> None:
    pictures = photographs(20)
    (tmp_path / "set").mkdir()
    Image.fromarray(pictures[3]).save(tmp_path / "set" / "copy.bmp")
    finding = overlap(of(pictures, "calibration"), signatures(image_folder(tmp_path / "set"), COLOUR))
    assert finding.verdict == PROBLEM
    assert finding.figures["pairs"] == [
        {"image": "copy.bmp", "twin": "calibration image 3", "distance": 0, "equal": True}
    ]
    assert "copy.bmp = calibration image 3" in finding.evidence[0]


def test_a_picture_twice_is_named_once_with_its_first() -> None:
    pictures = photographs(20)
    pictures[7] = pictures[15] = pictures[2]
    finding = duplicates(of(pictures))
    assert finding.verdict == WARNING
    pairs = [(twins["image"], twins["twin"]) for twins in finding.figures["pairs"]]
    assert pairs == [("set image 7", "set image 2"), ("set image 15", "set image 2")]


def test_pictures_of_one_colour_are_equal_or_nothing() -> None:
    flat = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None], (24, 40, 40, 3)).copy()
    assert twins_within(of(flat), 64) == ()
    flat[5] = flat[1]
    (twins,) = twins_within(of(flat), 64)
    assert twins.equal


def test_few_copies_among_many_images_only_warn_or_do_not_matter() -> None:
    known = of(photographs(1))
    near = np.clip(photographs(1).astype(int) + 3, 0, 255).astype(np.uint8)
    assert overlap(known, of(near)).verdict == WARNING
    thousand = Signatures(
        np.arange(1200),
        tuple(map(str, range(1200))),
        (*of(near).pixels, *(f"other {index}" for index in range(1199))),
        np.concatenate([of(near).looks, np.random.default_rng(4).random((1199, 256)) < 0.5]),
        {},
    )
    finding = overlap(known, thousand)
    assert finding.verdict == OK
    assert finding.evidence[-1].startswith("0.083 % of the evaluation images")


def test_fashion_mnists_calibration_images_are_different_pictures() -> None:
    images = fashion_mnist_calibration()
    found = signatures(images, GREY)
    assert duplicates(found).verdict == OK
    again = jpeg(Image.fromarray(np.asarray(images[9])).convert("RGB")).convert("L")
    copy = signatures(ImageSet.from_array("copy", np.asarray(again)[None]), GREY)
    (twins,) = twins_between(copy, found, near_distance(found.looks))
    assert twins.twin == "Fashion-MNIST calibration image 9"


def test_what_cannot_be_read_is_named_and_passed_over(tmp_path: Path) -> None:
    for index, each in enumerate(photographs(3)):
        Image.fromarray(each).save(tmp_path / f"{index}.png")
    (tmp_path / "1.jpg").write_text("no picture")
    done: list[int] = []
    found = signatures(image_folder(tmp_path), COLOUR, progress=done.append)
    assert found.readable.tolist() == [0, 2, 3]
    assert list(found.unreadable) == [1]
    assert "1.jpg is not an image" in found.unreadable[1]
    assert done == [1, 2, 3, 4]
    assert found.name(1) == "1.png"
