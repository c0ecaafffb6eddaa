"""Makes `data/fashion_mnist.npz`: `python -m edgewright.calibration.make_fashion_mnist [FOLDER] [OUTPUT]`.

FOLDER holds the four idx files, by default those of Debian's package dataset-fashion-mnist. The same images give the
same bytes, given the same zlib: the choice is seeded and the time stamps are fixed.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import DataError
from edgewright.runtime.files import write_bytes

from .fashion_mnist import ALTERNATIVES, CALIBRATION_IMAGES, CLASSES, DEBIAN_FOLDER, SHIPPED_FILE, read_split

__all__ = ["calibration_choice", "npz_bytes", "shipped_arrays"]

SEED = 0
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state


def calibration_choice(labels: NDArray[np.int64], eligible: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Indices of `count` eligible images, classes balanced to within one image, in a random order.

    Any first part of it is a fair sample, so that fewer calibration images can be taken from the front.
    """
    random = np.random.RandomState(SEED)  # its stream is frozen (NEP 19)
    shares = [count // CLASSES + (label < count % CLASSES) for label in range(CLASSES)]
    chosen = [
        random.permutation(np.flatnonzero(eligible & (labels == label)))[:share] for label, share in enumerate(shares)
    ]
    return random.permutation(np.concatenate(chosen))


def shipped_arrays(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """What ships: the test images in their own order, and the choice for calibration. Raises `DataError`."""
    training, test = read_split(folder, "train"), read_split(folder, "t10k")
    if training is None or test is None:
        raise DataError(f"{folder} does not hold Fashion-MNIST's four idx files", ALTERNATIVES)
    in_test = {image.tobytes() for image in test[0]}
    eligible = np.array([image.tobytes() not in in_test for image in training[0]])
    choice = calibration_choice(training[1], eligible, CALIBRATION_IMAGES)
    return {
        "test_images": test[0],
        "test_labels": test[1].astype(np.uint8),
        "calibration_images": training[0][choice],
        "calibration_labels": training[1][choice].astype(np.uint8),
    }


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What `np.savez_compressed` writes, but with fixed time stamps and the best compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=ZIP_EPOCH)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def main() -> None:
    """Writes the file that ships."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_FOLDER
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else SHIPPED_FILE
    content = npz_bytes(shipped_arrays(folder))
    write_bytes(output, content)
    print(f"{output}: {len(content)} bytes")


if __name__ == "__main__":
    main()
