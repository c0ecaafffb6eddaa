"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence): what ships with the project, and the full set where it is.

The shipped file, `data/fashion_mnist.npz`, holds the 10,000 test images and 1,024 training images for calibration;
`make_fashion_mnist.py` makes it. The full set comes as the usual idx files, gzipped or not.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import DataError

from .image_set import ImageSet

__all__ = [
    "CALIBRATION_IMAGES",
    "CLASSES",
    "FASHION_MNIST",
    "SHIPPED_FILE",
    "fashion_mnist_calibration",
    "fashion_mnist_test",
    "fashion_mnist_training",
    "read_idx",
    "read_split",
]

FASHION_MNIST = "fashion-mnist"
"""What a person calls the data set."""

SHIPPED_FILE = Path(__file__).parent / "data" / "fashion_mnist.npz"
CALIBRATION_IMAGES = 1024
CLASSES = 10
SIDE = 28  # pixels
SPLITS = {"train": 60_000, "t10k": 10_000}  # images by the prefix of the idx files
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
UINT8_IDX = 0x0800  # the idx magic number is this plus the number of dimensions
ALTERNATIVES = (
    "install Debian's package dataset-fashion-mnist, or name a folder that holds train-images-idx3-ubyte.gz and "
    "train-labels-idx1-ubyte.gz from https://github.com/zalandoresearch/fashion-mnist"
)

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


def fashion_mnist_test(shipped: Path = SHIPPED_FILE) -> ImageSet:
    """The 10,000 test images, uint8 `[28, 28]`, labelled. Raises `DataError` if the shipped file is damaged."""
    return ImageSet.from_array("Fashion-MNIST test", *_shipped_split(shipped, "test", SPLITS["t10k"]))


def fashion_mnist_calibration(shipped: Path = SHIPPED_FILE) -> ImageSet:
    """1,024 training images, uint8 `[28, 28]`, classes balanced and shuffled. Raises `DataError` as for the test."""
    return ImageSet.from_array("Fashion-MNIST calibration", *_shipped_split(shipped, "calibration", CALIBRATION_IMAGES))


def fashion_mnist_training(folder: Path | None = None) -> Split:
    """The 60,000 training images, uint8 `[60000, 28, 28]`, and their labels, int64 `[60000]`.

    Looks in `folder`, in Debian's package, and where torchvision puts its download; downloads through torchvision if
    they are nowhere. Raises `DataError` if a file is damaged, `folder` does not exist, or the download fails.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "name one that holds Fashion-MNIST, or leave it out")
    for place in _places(folder):
        split = read_split(place, "train")
        if split is not None:
            return split
    return _downloaded(_cache_folder())


def read_split(folder: Path, prefix: str) -> Split | None:
    """Images uint8 `[N, 28, 28]` and labels int64 `[N]` of the split "train" or "t10k", or None if it is not there.

    Raises `DataError` if its files are not Fashion-MNIST's.
    """
    images_file, labels_file = _idx_file(folder, f"{prefix}-images", 3), _idx_file(folder, f"{prefix}-labels", 1)
    if images_file is None or labels_file is None:
        return None
    count = SPLITS[prefix]
    images = read_idx(images_file, (count, SIDE, SIDE))
    labels = read_idx(labels_file, (count,)).astype(np.int64)
    if labels.max() >= CLASSES:
        raise DataError(f"{labels_file} holds the label {labels.max()}, Fashion-MNIST has 0 to 9", "replace the file")
    return images, labels


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The uint8 array in an idx file, gzipped if its name ends in .gz; a writable array of the expected `shape`.

    Raises `DataError` if the file is damaged, of another kind, or of another shape.
    """
    header_size, size = 4 * (1 + len(shape)), math.prod(shape)
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(header_size + size + 1)  # not all of it: a small gz can hold a great deal
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", "replace or remove the file") from None
    if len(content) < header_size:
        raise DataError(f"{path} ends within its header", "replace or remove the file")
    magic, *found = (int(word) for word in np.frombuffer(content[:header_size], ">u4"))
    if magic != UINT8_IDX + len(shape):
        raise DataError(
            f"{path} has the magic number {magic:#010x}, expected {UINT8_IDX + len(shape):#010x} (idx of uint8)",
            "replace or remove the file",
        )
    if tuple(found) != shape:
        raise DataError(
            f"{path} holds an array {found}, Fashion-MNIST's is {list(shape)}", "replace or remove the file"
        )
    if len(content) != header_size + size:
        fact = "is truncated" if len(content) < header_size + size else "is longer than its header says"
        raise DataError(f"{path} {fact}", "replace or remove the file")
    array: NDArray[np.uint8] = np.frombuffer(content, np.uint8, offset=header_size).reshape(shape).copy()
    return array


def _idx_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    for dot in ("-", "."):  # some unpackers name it train-images.idx3-ubyte
        for suffix in (".gz", ""):
            path = folder / f"{stem}{dot}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgewright"


def _places(folder: Path | None) -> list[Path]:
    roots = [_cache_folder()] if folder is None else [folder, _cache_folder()]
    raw = [root / "FashionMNIST" / "raw" for root in roots]  # torchvision's layout
    return [DEBIAN_FOLDER, *raw] if folder is None else [folder, raw[0], DEBIAN_FOLDER, raw[1]]


def _downloaded(cache: Path) -> Split:
    """The training set from torchvision's mirror, kept under `cache` once it is whole."""
    try:
        from torchvision.datasets import FashionMNIST

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as temporary:
            FashionMNIST(temporary, train=True, download=True)
            raw = Path(temporary) / "FashionMNIST" / "raw"
            split = read_split(raw, "train")
            if split is not None:
                _keep(raw, cache / "FashionMNIST" / "raw")
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's message has several lines
        raise DataError(
            f"Fashion-MNIST's training images are not here and the download failed ({reason})", ALTERNATIVES
        ) from None
    if split is None:
        raise DataError("the download of Fashion-MNIST's training images came without its files", ALTERNATIVES)
    return split


def _keep(downloaded: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # another run has just put the same files there
        downloaded.replace(target)


def _shipped_split(path: Path, name: str, count: int) -> Split:
    """One split of the shipped file. A zip carries a CRC-32 of each array, so that damage does not pass."""
    reinstall = "install edgewright again"
    try:
        with zipfile.ZipFile(path) as archive:
            images, labels = (
                np.lib.format.read_array(io.BytesIO(archive.read(f"{name}_{part}.npy")), allow_pickle=False)
                for part in ("images", "labels")
            )
    except FileNotFoundError:
        raise DataError(f"{path}, which ships with edgewright, is missing", reinstall) from None
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}, which ships with edgewright, is damaged: {error}", reinstall) from None
    if images.dtype != np.uint8 or images.shape != (count, SIDE, SIDE) or labels.shape != (count,):
        raise DataError(f"{path} holds {name} images {images.dtype} {list(images.shape)}, not its own", reinstall)
    return images, labels.astype(np.int64)
