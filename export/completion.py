"""What a network does not say of itself, said by a person: input shape, normalization, resize, crop, labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgewright.export.entries import InputShape, ModelSource
from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

__all__ = ["Completion", "completed"]

COLOUR_OF_CHANNELS = {1: "L", 3: "RGB"}
LARGEST_INPUT = 1 << 28  # values of one image: 1 GiB of float32


@dataclass(frozen=True)
class Completion:
    """None where a person has said nothing; the units are those of `Preprocess`.

    * input_shape: (C, H, W) of one preprocessed image
    """

    input_shape: InputShape | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str | None = None
    labels: tuple[str, ...] | None = None


def completed(source: ModelSource, said: Completion) -> ModelSource:
    """`source` with what was `said`, which goes before what the source says of itself.

    What is still unknown stays None, and its options stand in `missing`. Raises `ModelError` where the parts
    contradict each other.
    """
    parts = _agreeing(_parts(source, said), source, said)
    shape = said.input_shape or _result_shape(parts) or source.input_shape
    if shape is not None and math.prod(shape) > LARGEST_INPUT:
        raise ModelError(f"images of {_times(shape)} are larger than any network takes", "correct --input-shape")
    labels = source.labels if said.labels is None else said.labels
    needed = {
        "--input-shape": shape,
        "--mean": parts.mean,
        "--std": parts.std,
        "--resize": parts.resize or parts.crop,
        "--labels": labels,
    }
    return replace(
        source,
        input_shape=shape,
        preprocess=_preprocess(parts, shape),
        labels=labels,
        missing=tuple(option for option, value in needed.items() if value is None),
    )


def _parts(source: ModelSource, said: Completion) -> Completion:
    """What was said, and behind it what the source says; a resize and a crop belong together."""
    known = source.preprocess
    if known is None:
        return said
    resize, crop = (said.resize, said.crop) if said.resize or said.crop else (known.resize, known.crop)
    return replace(
        said,
        mean=said.mean or known.mean,
        std=said.std or known.std,
        resize=resize,
        crop=crop,
        interpolation=said.interpolation or known.interpolation,
    )


def _agreeing(parts: Completion, source: ModelSource, said: Completion) -> Completion:
    """The parts that go together; those of the source give way to what was said."""
    wanted = said.input_shape or (source.input_shape if source.onnx else None)
    result = _result_shape(parts)
    if wanted is None or result is None or result == wanted:
        return parts
    normalization = said.mean or said.std
    if normalization and len(normalization) != wanted[0]:
        raise ModelError(
            f"--mean and --std have {len(normalization)} channels, the network takes {wanted[0]}", "make them agree"
        )
    if said.resize or said.crop:
        raise ModelError(
            f"images of {_times(result)} come out of --resize and --crop, the network takes {_times(wanted)}",
            "make them agree",
        )
    if result[0] != wanted[0]:
        parts = replace(parts, mean=said.mean, std=said.std)
    return replace(parts, resize=None, crop=None)


def _result_shape(parts: Completion) -> InputShape | None:
    """(C, H, W) of what the preprocessing gives, if that does not depend on the image."""
    size = parts.crop or (parts.resize if isinstance(parts.resize, tuple) else None)
    normalization = parts.mean or parts.std
    return None if size is None or normalization is None else (len(normalization), *size)


def _preprocess(parts: Completion, shape: InputShape | None) -> Preprocess | None:
    if shape is None or parts.mean is None or parts.std is None or not (parts.resize or parts.crop):
        return None
    if shape[0] not in COLOUR_OF_CHANNELS:
        raise ModelError(f"the network takes {shape[0]} channels", "images have 1 (grey) or 3 (RGB)")
    if _result_shape(parts) != shape:
        raise ModelError(
            f"a resize of the shorter side to {parts.resize} gives no images of {_times(shape)}",
            f"add --crop {shape[1]},{shape[2]}",
        )
    colour = COLOUR_OF_CHANNELS[shape[0]]
    return Preprocess(parts.resize, parts.crop, parts.mean, parts.std, parts.interpolation or "bilinear", colour)


def _times(shape: InputShape) -> str:
    return "×".join(map(str, shape))
