"""`Preprocess` against torchvision's own transforms, bit for bit; what it refuses; mutants that the oracle catches."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import INTERPOLATIONS, Preprocess, crop_start, open_image, resized_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
IMAGENET = Preprocess(resize=40, crop=(32, 32), mean=MEAN, std=STD)

pytest.importorskip("torchvision")


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise: every rounding of a resize shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "P":
        return Image.fromarray(noise[..., :3]).quantize(16)
    if mode == "CMYK":
        return Image.merge("CMYK", [Image.fromarray(noise[..., channel]) for channel in range(4)])
    return Image.fromarray(noise).convert(mode)


def by_torchvision(preprocess: Preprocess, image: Image.Image) -> NDArray[np.float32]:
    """The oracle: torchvision.transforms on a PIL image as ImageFolder's loader gives it."""
    from torchvision import transforms

    resize = [preprocess.resize] if isinstance(preprocess.resize, int) else preprocess.resize
    mode = transforms.InterpolationMode(preprocess.interpolation)
    steps: list[Any] = [] if resize is None else [transforms.Resize(list(resize), mode)]
    steps += [] if preprocess.crop is None else [transforms.CenterCrop(preprocess.crop)]
    steps += [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about the transparency that convert() drops
        converted = image.convert(preprocess.colour)
    return cast("NDArray[np.float32]", transforms.Compose(steps)(converted).numpy())


def assert_same(preprocess: Preprocess, image: Image.Image) -> None:
    ours, theirs = preprocess(image), by_torchvision(preprocess, image)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs, strict=True)


SIZES = [
    (48, 64),
    (64, 48),
    (40, 40),
    (41, 40),
    (33, 77),
    (20, 90),
    (16, 16),
    (1, 1),
    (1, 50),
    (50, 1),
    (31, 33),
    (400, 3),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", sorted(set(INTERPOLATIONS) - {"lanczos"}))
@pytest.mark.parametrize("resize", [40, 24, (32, 32), (30, 47), None], ids=str)
def test_equals_torchvision_at_every_size(
    size: tuple[int, int], interpolation: str, resize: int | tuple[int, int] | None
) -> None:
    preprocess = replace(IMAGENET, resize=resize, interpolation=interpolation)
    assert_same(preprocess, picture(*size, seed=sum(size)))


def test_lanczos_equals_torchvision() -> None:
    assert_same(replace(IMAGENET, interpolation="lanczos"), picture(70, 90))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.one_of(st.integers(1, 50), st.tuples(st.integers(1, 50), st.integers(1, 50)), st.none()),
    crop=st.one_of(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.none()),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
def test_equals_torchvision_for_any_sizes(
    size: tuple[int, int], resize: int | tuple[int, int] | None, crop: tuple[int, int] | None, interpolation: str
) -> None:
    assert_same(Preprocess(resize, crop, MEAN, STD, interpolation), picture(*size))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "YCbCr", "HSV"])
@pytest.mark.parametrize("colour", ["RGB", "L"])
def test_equals_torchvision_in_every_mode(mode: str, colour: str) -> None:
    channels = 3 if colour == "RGB" else 1
    assert_same(replace(IMAGENET, colour=colour, mean=MEAN[:channels], std=STD[:channels]), picture(50, 61, mode))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGBA", "a.png"),
        ("LA", "a.png"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("L", "a.jpg"),
        ("RGB", "a.jpg"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tif"),
        ("RGB", "a.webp"),
        ("1", "a.png"),
        ("RGB", "a.ppm"),
        ("RGB", "a.bmp"),
    ],
)
def test_equals_torchvision_from_a_file(tmp_path: Path, mode: str, name: str) -> None:
    path = tmp_path / name
    picture(57, 45, mode).save(path)
    with Image.open(path) as opened:
        theirs = by_torchvision(IMAGENET, opened)
    np.testing.assert_array_equal(IMAGENET(path), theirs, strict=True)
    np.testing.assert_array_equal(IMAGENET(str(path)), theirs, strict=True)


def test_equals_the_transforms_that_torchvision_ships_with_its_weights() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(crop_size=32, resize_size=36, interpolation=InterpolationMode.BICUBIC)
    image = picture(80, 55)
    ours = replace(IMAGENET, resize=36, interpolation="bicubic")(image)
    np.testing.assert_array_equal(ours, preset(image).numpy(), strict=True)


def test_pixels_equal_those_of_transforms_v2() -> None:
    from torchvision.transforms import v2

    image = picture(80, 55)
    theirs = np.asarray(v2.Compose([v2.Resize(40), v2.CenterCrop(32)])(image))
    np.testing.assert_array_equal(IMAGENET.pixels(image), theirs, strict=True)


def test_every_byte_is_normalized_as_torchvision_does() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert_same(Preprocess(None, (16, 16), MEAN, STD), Image.fromarray(ramp))


def test_orientation_in_exif_is_ignored_as_torchvision_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    picture(60, 40).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        theirs = by_torchvision(IMAGENET, opened)
    np.testing.assert_array_equal(IMAGENET(tmp_path / "a.jpg"), theirs)


def test_transparency_of_a_palette_is_dropped_silently(tmp_path: Path) -> None:
    image = picture(50, 40, "P")
    image.save(tmp_path / "a.png", transparency=bytes(range(16)))
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        theirs = by_torchvision(IMAGENET, opened)
        np.testing.assert_array_equal(IMAGENET(opened), theirs)
        assert opened.info["transparency"] == bytes(range(16)), "the caller's image was changed"
    np.testing.assert_array_equal(IMAGENET(tmp_path / "a.png"), theirs)


def test_arrays_are_images() -> None:
    colour, grey = np.asarray(picture(50, 40)), np.asarray(picture(50, 40, "L"))
    np.testing.assert_array_equal(IMAGENET(colour), IMAGENET(picture(50, 40)))
    np.testing.assert_array_equal(IMAGENET(grey), IMAGENET(picture(50, 40, "L")))
    np.testing.assert_array_equal(IMAGENET(grey[..., None]), IMAGENET(grey))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "RGB"])
@pytest.mark.parametrize("colour", ["RGB", "L"])
def test_source_pixels_are_the_whole_image_in_the_colours_of_the_network(mode: str, colour: str) -> None:
    channels = 3 if colour == "RGB" else 1
    preprocess, image = (
        replace(IMAGENET, colour=colour, mean=MEAN[:channels], std=STD[:channels]),
        picture(50, 61, mode),
    )
    pixels = preprocess.source_pixels(image)
    assert pixels.shape == (61, 50, channels)
    np.testing.assert_array_equal(pixels.squeeze(), np.asarray(image.convert(colour)))
    np.testing.assert_array_equal(preprocess(pixels), preprocess(image))


def test_source_pixels_of_a_deep_image_are_refused() -> None:
    with pytest.raises(DataError, match="more than 8 bits"):
        IMAGENET.source_pixels(Image.new("I", (40, 40)))


@pytest.mark.parametrize(
    ("length", "crop", "start"),
    [(10, 4, 3), (10, 5, 2), (11, 4, 4), (13, 4, 4), (4, 10, -3), (5, 10, -2), (1, 4, -1), (7, 7, 0)],
)
def test_a_centre_crop_starts_where_torchvision_does(length: int, crop: int, start: int) -> None:
    from torchvision.transforms.functional import center_crop

    assert crop_start(length, crop) == start
    ramp = Image.fromarray(np.arange(1, length + 1, dtype=np.uint8)[None])
    kept = np.asarray(center_crop(ramp, [1, crop]))[0]
    assert kept.tolist() == [i + 1 if 0 <= i < length else 0 for i in range(start, start + crop)]


@pytest.mark.parametrize("resize", [40, 24, 7, (30, 47), None], ids=str)
@pytest.mark.parametrize("size", [(60, 83), (83, 60), (50, 50), (1, 9), (400, 3)], ids=str)
def test_resized_size_is_that_of_the_image(size: tuple[int, int], resize: int | tuple[int, int] | None) -> None:
    height, width, _ = replace(IMAGENET, resize=resize, crop=None).pixels(picture(*size)).shape
    assert resized_size(size, resize) == (width, height)


def test_batch_stacks_single_images() -> None:
    images = [picture(50, 40, seed=seed) for seed in range(3)]
    batch = IMAGENET.batch(images)
    assert batch.shape == (3, 3, 32, 32)
    np.testing.assert_array_equal(batch[2], IMAGENET(images[2]))


# Mutants: each of these slips must show against the oracle, or the tests above prove nothing.


def without_antialias(image: Image.Image) -> NDArray[np.float32]:
    import torch
    from torchvision.transforms import functional

    resized = functional.resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), [32, 32], antialias=False)
    return IMAGENET.normalize(resized.permute(1, 2, 0).numpy())


def with_rounded_long_side(image: Image.Image) -> NDArray[np.float32]:
    short, long = sorted(image.size)
    size = (40, round(40 * long / short)) if image.width <= image.height else (round(40 * long / short), 40)
    return replace(IMAGENET, resize=size[::-1])(image)


def with_truncated_crop(image: Image.Image) -> NDArray[np.float32]:
    resized = replace(IMAGENET, crop=None).pixels(image)
    top, left = (resized.shape[0] - 32) // 2, (resized.shape[1] - 32) // 2
    return IMAGENET.normalize(resized[top : top + 32, left : left + 32])


def with_reciprocals(image: Image.Image) -> NDArray[np.float32]:
    pixels = np.moveaxis(IMAGENET.pixels(image), -1, 0).astype(np.float32)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return cast("NDArray[np.float32]", (pixels * np.float32(1 / 255) - mean) / std)


@pytest.mark.parametrize(
    ("mutant", "resize", "height"),
    [
        (without_antialias, (32, 32), 83),
        (with_rounded_long_side, 40, 82),  # 40 · 82 / 60 = 54.7
        (with_truncated_crop, 40, 83),  # 55 − 32 is odd, and 11.5 rounds to 12
        (with_reciprocals, 40, 83),
    ],
)
def test_the_oracle_tells_a_mutant(
    mutant: Callable[[Image.Image], NDArray[np.float32]], resize: int | tuple[int, int], height: int
) -> None:
    preprocess, image = replace(IMAGENET, resize=resize), picture(60, height)
    theirs = by_torchvision(preprocess, image)
    np.testing.assert_array_equal(preprocess(image), theirs)
    assert not np.array_equal(mutant(image), theirs)


# Refusals


def test_refuses_16_bit_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits a channel .* convert it"):
        IMAGENET(tmp_path / "deep.png")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_refuses_deep_pil_images(mode: str) -> None:
    with pytest.raises(DataError, match="more than 8 bits"):
        IMAGENET(Image.new(mode, (40, 40)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.bool_])
def test_refuses_arrays_that_are_not_uint8(dtype: type) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        IMAGENET(np.zeros((40, 40, 3), dtype))


@pytest.mark.parametrize("shape", [(40, 40, 4), (40, 40, 2), (3, 40, 40), (40,), (1, 40, 40, 3), (0, 40, 3), (40, 0)])
def test_refuses_arrays_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected \[H, W\]"):
        IMAGENET(np.zeros(shape, np.uint8))


def jpeg() -> bytes:
    stream = io.BytesIO()
    picture(80, 90).save(stream, "jpeg")
    return stream.getvalue()


def png() -> bytes:
    stream = io.BytesIO()
    picture(80, 90).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is a text\n",
        jpeg()[: len(jpeg()) // 2],
        jpeg()[:30],
        png()[:-400],
        b"P6\n0 5\n255\n",
        b"GIF89a",
        png()[:60] + b"\0" * 40 + png()[100:],
    ],
    ids=[
        "empty",
        "text",
        "half a jpeg",
        "a jpeg's start",
        "truncated png",
        "no pixels",
        "a gif's start",
        "damaged png",
    ],
)
def test_refuses_files_that_are_no_whole_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        IMAGENET(path)


def test_refuses_a_missing_path_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png does not exist; check the path"):
        IMAGENET(tmp_path / "absent.png")
    with pytest.raises(DataError, match=tmp_path.name):
        IMAGENET(tmp_path)


def test_refuses_a_truncated_image_that_pillow_has_only_opened(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(jpeg()[: len(jpeg()) // 2])
    with Image.open(path) as opened, pytest.raises(DataError, match="truncated"):
        IMAGENET(opened)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("resize", [40, (40, 40), None], ids=str)
def test_refuses_pil_images_without_pixels(size: tuple[int, int], resize: int | tuple[int, int] | None) -> None:
    with pytest.raises(DataError, match="no pixels"):
        replace(IMAGENET, resize=resize)(Image.new("RGB", size))


def test_refuses_a_mode_that_pillow_cannot_convert() -> None:
    with pytest.raises(DataError, match="mode La cannot become RGB"):
        IMAGENET(picture(40, 40, "LA").convert("La"))


def test_refuses_a_strip_that_a_resize_would_blow_up() -> None:
    with pytest.raises(DataError, match=r"1×200000 pixels, and would be 256×51200000"):
        replace(IMAGENET, resize=256)(Image.new("L", (1, 200_000)))


def test_refuses_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(60, 60).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png.*scale the image down"):
        IMAGENET(tmp_path / "bomb.png")


def test_closes_its_files(tmp_path: Path) -> None:
    picture(40, 40).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.getpixel((0, 0)) == picture(40, 40).getpixel((0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "BGR"}, "colour"),
        ({"interpolation": "hamming"}, "interpolation"),
        ({"mean": (0.5,)}, "needs 3 of each"),
        ({"colour": "L"}, "needs 1 of each"),
        ({"std": (0.2, 0.0, 0.2)}, "above 0"),
        ({"std": (0.2, float("inf"), 0.2)}, "finite"),
        ({"mean": (0.2, float("nan"), 0.2)}, "finite"),
        ({"resize": 0}, "at least one pixel"),
        ({"resize": (0, 8)}, "at least one pixel"),
        ({"resize": 8, "crop": (0, 8)}, "at least one pixel"),
        ({"resize": None, "crop": (8, -1)}, "at least one pixel"),
    ],
)
def test_refuses_a_preprocessing_without_meaning(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(IMAGENET, **change)


# Plain data


@pytest.mark.parametrize(
    "preprocess",
    [IMAGENET, replace(IMAGENET, resize=(3, 4), crop=None), Preprocess(None, None, (0.1,), (0.3,), "lanczos", "L")],
)
def test_json_round_trip(preprocess: Preprocess) -> None:
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_input_shape_is_known_only_where_it_is_fixed() -> None:
    assert IMAGENET.input_shape == (3, 32, 32)
    assert replace(IMAGENET, resize=(20, 30), crop=None).input_shape == (3, 20, 30)
    assert replace(IMAGENET, crop=None).input_shape is None
    assert replace(IMAGENET, resize=None, crop=None).input_shape is None
    assert IMAGENET.with_size(64).input_shape == (3, 64, 64)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_fingerprint_is_that_of_the_pixels(interpolation: str) -> None:
    preprocess = replace(IMAGENET, interpolation=interpolation)
    assert preprocess.fingerprint() == preprocess.fingerprint()
    assert preprocess.fingerprint() == replace(preprocess, mean=(0.0,) * 3).fingerprint(), "only pixels count"


def test_the_fingerprint_tells_another_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of Pillow, or another way to resize, would give it."""
    before = IMAGENET.fingerprint()
    others = [replace(IMAGENET, interpolation=name) for name in ("nearest", "bicubic", "lanczos")]
    others += [replace(IMAGENET, crop=(31, 32)), replace(IMAGENET, resize=41)]
    assert len({before, *(other.fingerprint() for other in others)}) == 6
    resize = Image.Image.resize

    def off_by_one(picture: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        resized = resize(picture, *arguments, **options)
        middle = (resized.width // 2, resized.height // 2)
        red, green, blue = resized.getpixel(middle)  # type: ignore[misc]
        resized.putpixel(middle, (red, green, (blue + 1) % 256))
        return resized

    monkeypatch.setattr(Image.Image, "resize", off_by_one)
    assert IMAGENET.fingerprint() != before
