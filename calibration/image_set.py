"""A set of images that is never in memory as a whole: files or one uint8 array, known by the hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import DataError
from edgewright.runtime.files import sha256_of, sha256_of_file
from edgewright.runtime.preprocess import ImageLike

__all__ = ["ImageSet", "check_disjoint", "without"]

NAMED_IN_ERRORS = 3  # a message names so many files and counts the rest


class ImageSource(Protocol):
    """Where images lie: the `position`-th one, what to call it, and the SHA-256 of its stored content."""

    def __len__(self) -> int: ...

    def image(self, position: int) -> ImageLike: ...

    def image_name(self, position: int) -> str: ...

    def fingerprint(self, position: int) -> str: ...


@dataclass(frozen=True)
class ArraySource:
    """Images of one size, uint8 `[N, H, W]` or `[N, H, W, 3]`."""

    name: str
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, position: int) -> ImageLike:
        image: NDArray[np.uint8] = self.images[position]
        return image

    def image_name(self, position: int) -> str:
        return f"{self.name} image {position}"

    def fingerprint(self, position: int) -> str:
        image = self.images[position]
        return sha256_of([str(image.shape).encode(), image.tobytes()])  # the same bytes in another shape differ


@dataclass(frozen=True)
class FileSource:
    """Image files, as paths relative to `root`; a file is read once for its hash, however many subsets ask."""

    root: Path
    files: tuple[str, ...]
    known: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, position: int) -> ImageLike:
        return self.root / self.files[position]

    def image_name(self, position: int) -> str:
        return str(self.root / self.files[position])

    def fingerprint(self, position: int) -> str:
        if position not in self.known:
            path = self.root / self.files[position]
            try:
                self.known[position] = sha256_of_file(path)
            except OSError as error:
                raise DataError(
                    f"cannot read {path}: {error.strerror or error}", "replace the file or remove it"
                ) from None
        return self.known[position]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, with or without labels; an image is read only when it is asked for.

    * positions: which images of `source`, int64 `[N]`
    * labels: class indices, int64 `[N]`, or None if there are none
    """

    name: str
    source: ImageSource
    positions: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels.shape != self.positions.shape:
            raise DataError(f"{self.name} has {len(self.positions)} images but {len(self.labels)} labels")

    @classmethod
    def from_array(cls, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> ImageSet:
        """All of `images`, uint8 `[N, H, W]` or `[N, H, W, 3]`."""
        return cls(name, ArraySource(name, images), np.arange(len(images)), labels)

    @classmethod
    def from_files(cls, root: Path, files: Sequence[str], labels: Sequence[int] | None = None) -> ImageSet:
        """The `files`, paths relative to `root`."""
        indices = None if labels is None else np.asarray(labels, np.int64)
        return cls(str(root), FileSource(root, tuple(files)), np.arange(len(files)), indices)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> ImageLike:
        """The path of an image, or its uint8 array. Raises `IndexError` past the end."""
        return self.source.image(int(self.positions[index]))

    def __iter__(self) -> Iterator[ImageLike]:
        return (self[index] for index in range(len(self)))

    def image_name(self, index: int) -> str:
        """What to call an image in a message: its path, or its number in the array."""
        return self.source.image_name(int(self.positions[index]))

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order; nothing is copied but the indices."""
        chosen = np.asarray(indices, np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, positions=self.positions[chosen], labels=labels)

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of each image as it is stored, without decoding. Raises `DataError` if a file cannot be read."""
        return tuple(self.source.fingerprint(int(position)) for position in self.positions)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of contents, labels and order: the same for the same images, wherever and under whatever names."""
        digest = hashlib.sha256(f"images {len(self)} labelled {self.labels is not None}\n".encode())
        for fingerprint in self.fingerprints:
            digest.update(bytes.fromhex(fingerprint))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def without(images: ImageSet, others: ImageSet) -> ImageSet:
    """Those of `images` whose content is not in `others`."""
    known = set(others.fingerprints)
    return images.subset([index for index, found in enumerate(images.fingerprints) if found not in known])


def check_disjoint(calibration: ImageSet, evaluation: ImageSet, *, allow_overlap: bool) -> None:
    """Raises `DataError` if an image, by its content, is in both sets: it would be judged by what chose the ranges."""
    if allow_overlap:
        return
    chosen = {fingerprint: index for index, fingerprint in reversed(list(enumerate(calibration.fingerprints)))}
    shared = [index for index, fingerprint in enumerate(evaluation.fingerprints) if fingerprint in chosen]
    if not shared:
        return
    named = []
    for index in shared[:NAMED_IN_ERRORS]:
        twin = calibration.image_name(chosen[evaluation.fingerprints[index]])
        name = evaluation.image_name(index)
        named.append(name if name == twin else f"{name} (the same as {twin})")
    more = f" and {len(shared) - len(named)} more" if len(shared) > len(named) else ""
    raise DataError(
        f"{len(shared)} of {len(evaluation)} evaluation images are calibration images too: {', '.join(named)}{more}",
        "remove them from one of the two, or give --allow-overlap",
    )
