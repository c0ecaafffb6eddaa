"""One preprocessing for training, calibration, evaluation and the runtime.

decode → convert("RGB" | "L") → resize (Pillow, antialiased) → centre crop → float32 / 255 → (x − mean) / std → CHW.

The arithmetic is that of torchvision's transforms on PIL images (`Resize`, `CenterCrop`, `ToTensor`, `Normalize`), to
the last bit, without torch: the same Pillow resize, and float32 operations in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import DataError
from .files import sha256_of

__all__ = ["COLOURS", "ImageLike", "Preprocess", "crop_start", "open_image", "resized_size"]

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""What can be classified: a path, a PIL image, or a uint8 array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` (RGB)."""

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
COLOURS = {"RGB": 3, "L": 1}
PROBES = ((480, 640), (640, 480), (61, 97), (97, 61))  # (H, W): larger and smaller than inputs are, either way round
MADE_UP_TILE = 61  # pixels
MAX_RESIZED_PIXELS = 178_956_970  # twice Pillow's default MAX_IMAGE_PIXELS, where Pillow itself refuses to decode
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a channel: convert() would clip them


@dataclass(frozen=True)
class Preprocess:
    """Turns an image into the network's input, float32 `[C, H, W]`.

    * resize: length of the shorter side in pixels (aspect kept), or (H, W), or None
    * crop: centre crop (H, W) in pixels, padded with black where the image is smaller, or None
    * mean, std: per channel, on the scale 0…1; their length is the number of channels
    * colour: "RGB" or "L"
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    colour: str = "RGB"

    def __post_init__(self) -> None:
        if self.colour not in COLOURS:
            raise DataError(f"colour is {self.colour!r}, expected one of {', '.join(COLOURS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        channels = COLOURS[self.colour]
        if len(self.mean) != channels or len(self.std) != channels:
            raise DataError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, {self.colour} needs {channels} of each"
            )
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise DataError(f"mean {self.mean} and std {self.std} must be finite, std above 0")
        resize = (self.resize,) if isinstance(self.resize, int) else self.resize or ()
        sides = (*resize, *(self.crop or ()))
        if any(side < 1 for side in sides):
            raise DataError(f"resize {self.resize} and crop {self.crop} must be at least one pixel")

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every result, or None if the size depends on the image."""
        size = self.crop or (self.resize if isinstance(self.resize, tuple) else None)
        return None if size is None else (COLOURS[self.colour], *size)

    def with_size(self, size: int) -> Preprocess:
        """The same preprocessing with a plain resize to `size` × `size` pixels and no crop."""
        return replace(self, resize=(size, size), crop=None)

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """The resized and cropped image before normalization, uint8 `[H, W, C]`.

        Raises `DataError` if the image cannot be read or is none that a classifier is trained on.
        """
        picture = _converted(open_image(image), self.colour)
        target = resized_size(picture.size, self.resize)
        if target != picture.size:
            picture = picture.resize(target, INTERPOLATIONS[self.interpolation])
        if self.crop is not None:
            picture = _centre_cropped(picture, self.crop)
        return _pixels_of(picture)

    def source_pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """The decoded image in the network's colours, as large as it came, uint8 `[H, W, C]`: what `pixels` resizes.

        Raises `DataError` as `pixels` does.
        """
        return _pixels_of(_converted(open_image(image), self.colour))

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels `[..., H, W, C]` as float32 `[..., C, H, W]`: (x / 255 − mean) / std, every step rounded to float32.

        A byte has 256 values, so the formula is evaluated once for each and looked up.
        """
        channels = np.moveaxis(pixels, -1, -3)
        table = self.normalized_bytes()
        out = np.empty(channels.shape, np.float32)
        for channel, row in enumerate(table):
            np.take(row, channels[..., channel, :, :], out=out[..., channel, :, :])
        return out

    def normalized_bytes(self) -> NDArray[np.float32]:
        """What each byte becomes in each channel, float32 `[C, 256]`."""
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        mean = np.asarray(self.mean, np.float32)[:, None]
        std = np.asarray(self.std, np.float32)[:, None]
        table: NDArray[np.float32] = (levels[None] - mean) / std
        return table

    def __call__(self, image: ImageLike) -> NDArray[np.float32]:
        """The network's input for one image, float32 `[C, H, W]`."""
        return self.normalize(self.pixels(image))

    def batch(self, images: Iterable[ImageLike]) -> NDArray[np.float32]:
        """Several images as one float32 `[N, C, H, W]`."""
        return np.stack([self(image) for image in images])

    def fingerprint(self) -> str:
        """SHA-256 of what becomes of four made-up pictures: equal where this Pillow resizes as another one does.

        Pillow changed the order of its passes in 12.2 and in 13.0, and with it single levels of what comes out.
        """
        return sha256_of(self.pixels(_made_up(height, width)).tobytes() for height, width in PROBES)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_json`."""
        resize, crop = content["resize"], content["crop"]
        return cls(
            resize=tuple(resize) if isinstance(resize, list | tuple) else resize,
            crop=None if crop is None else tuple(crop),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            interpolation=content["interpolation"],
            colour=content["colour"],
        )


def _made_up(height: int, width: int) -> NDArray[np.uint8]:
    """A picture of noise between smooth columns, uint8 `[H, W, 3]`; from integers alone, so the same on any machine."""
    index = np.arange(MADE_UP_TILE**2 * 3, dtype=np.uint32)
    noise = (index * np.uint32(2654435761) >> np.uint32(13)).astype(np.uint8)  # Knuth, TAOCP 3, 6.4
    repeats = (-(-height // MADE_UP_TILE), -(-width // MADE_UP_TILE), 1)
    picture = np.tile(noise.reshape(MADE_UP_TILE, MADE_UP_TILE, 3), repeats)[:height, :width]
    picture[:, ::3] = (np.arange(height) * 255 // height)[:, None, None]
    return picture


def open_image(image: ImageLike) -> Image.Image:
    """A decoded PIL image. Raises `DataError` naming the file if it is missing, truncated or not an image."""
    if isinstance(image, np.ndarray):
        return _image_from_array(image)
    if isinstance(image, Image.Image):
        picture, name = image, "the image"
        try:
            picture.load()  # Pillow reads lazily: a truncated file shows itself only here
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DataError(f"cannot decode {name}: {error}", "replace the file or remove it") from None
    else:
        name = str(image)
        try:
            with Image.open(image) as opened:
                opened.load()
                picture = opened.copy() if opened.mode in DEEP_MODES else opened.convert(opened.mode)
        except UnidentifiedImageError:
            raise DataError(f"{name} is not an image that Pillow can read", "remove it or convert it") from None
        except Image.DecompressionBombError as error:
            raise DataError(f"{name}: {error}", "scale the image down first") from None
        except FileNotFoundError:
            raise DataError(f"{name} does not exist", "check the path") from None
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DataError(f"cannot decode {name}: {error}", "replace the file or remove it") from None
    if picture.mode in DEEP_MODES:
        raise DataError(
            f"{name} has more than 8 bits a channel (Pillow mode {picture.mode})", "convert it to an 8-bit image"
        )
    if 0 in picture.size:
        raise DataError(f"{name} has no pixels ({picture.width}×{picture.height})", "remove it")
    return picture


def _converted(picture: Image.Image, colour: str) -> Image.Image:
    if isinstance(picture.info.get("transparency"), bytes):  # Pillow would warn that convert() drops it, as we want
        picture = picture.copy()
        del picture.info["transparency"]
    try:
        return picture.convert(colour)
    except ValueError as error:
        raise DataError(f"an image of Pillow mode {picture.mode} cannot become {colour}: {error}") from None


def _image_from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise DataError(f"the image array is {array.dtype}, expected uint8 with values 0…255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"the image array has shape {list(array.shape)}, expected [H, W], [H, W, 1] or [H, W, 3]")
    return Image.fromarray(array)


def resized_size(size: tuple[int, int], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """Width and height of an image of `size` (width, height) after the resize that `Preprocess.resize` stands for.

    Raises `DataError` if it would not fit into memory.
    """
    width, height = size
    if resize is None:
        return size
    if isinstance(resize, tuple):
        target = (resize[1], resize[0])
    else:
        short, long = min(width, height), max(width, height)
        other = int(resize * long / short)  # torchvision truncates
        target = (resize, other) if width <= height else (other, resize)
    if target != size and target[0] * target[1] > MAX_RESIZED_PIXELS:  # 1 × 20000 pixels at 256 would take 5 GB
        raise DataError(
            f"the image is {width}×{height} pixels, and would be {target[0]}×{target[1]} after the resize",
            "crop it to an ordinary aspect ratio",
        )
    return target


def crop_start(length: int, crop: int) -> int:
    """The first of `length` pixels that a centre crop keeps; below 0 by what it pads before them."""
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)


def _centre_cropped(picture: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """Outside of the picture Pillow's crop is black."""
    height, width = crop
    left, top = crop_start(picture.width, width), crop_start(picture.height, height)
    return picture.crop((left, top, left + width, top + height))


def _pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(picture, np.uint8)
    return array if array.ndim == 3 else array[..., None]
