"""The shipped Fashion-MNIST against the original files, the search for the full set, and damaged files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.calibration import fashion_mnist
from edgewright.calibration.fashion_mnist import (
    DEBIAN_FOLDER,
    SHIPPED_FILE,
    fashion_mnist_calibration,
    fashion_mnist_test,
    fashion_mnist_training,
    read_idx,
    read_split,
)
from edgewright.calibration.image_set import ImageSet, check_disjoint
from edgewright.calibration.make_fashion_mnist import calibration_choice, main, npz_bytes, shipped_arrays
from edgewright.runtime.errors import DataError

needs_debian = pytest.mark.skipif(
    not (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").exists(), reason="the package dataset-fashion-mnist is missing"
)


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def original(name: str) -> NDArray[np.uint8]:
    """Read independently of our reader: the header's length is known."""
    with gzip.open(DEBIAN_FOLDER / name) as stream:
        content = stream.read()
    if "images" in name:
        return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(content, np.uint8, offset=8)


def all_images(image_set: ImageSet) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in image_set])


# What ships


def test_shipped_sets_have_the_promised_shape() -> None:
    test, calibration = fashion_mnist_test(), fashion_mnist_calibration()
    assert len(test) == 10_000
    assert len(calibration) == 1024
    assert test.labels is not None
    assert calibration.labels is not None
    assert test.labels.dtype == np.int64
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert set(np.bincount(calibration.labels)) == {102, 103}
    image = np.asarray(test[0])
    assert image.dtype == np.uint8
    assert image.shape == (28, 28)
    assert test.image_name(17) == "Fashion-MNIST test image 17"


def test_shipped_contents_are_those_that_results_were_reported_on() -> None:
    assert fashion_mnist_test().identity == "c840ede9211a3384d7da500ac8b407478a9ca64e98a26271ce2627bdc6bb15d2"
    assert fashion_mnist_calibration().identity == "fb161ed1416a36b12e8d6c454f2850ceb7254386fc21b0e6573e8ef90c6b5869"


def test_shipped_sets_share_no_image() -> None:
    check_disjoint(fashion_mnist_calibration(), fashion_mnist_test(), allow_overlap=False)


def test_any_first_part_of_the_calibration_images_has_all_classes() -> None:
    labels = fashion_mnist_calibration().labels
    assert labels is not None
    assert np.bincount(labels[:128], minlength=10).min() >= 5


def test_shipped_file_is_about_five_megabytes_and_carries_its_licence() -> None:
    assert SHIPPED_FILE.stat().st_size < 5_000_000
    licence = (SHIPPED_FILE.parent / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "Copyright © 2017 Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


@needs_debian
def test_shipped_test_images_equal_the_original_bit_for_bit() -> None:
    test = fashion_mnist_test()
    np.testing.assert_array_equal(all_images(test), original("t10k-images-idx3-ubyte.gz"), strict=True)
    np.testing.assert_array_equal(test.labels, original("t10k-labels-idx1-ubyte.gz"))


@needs_debian
def test_shipped_calibration_images_are_training_images_with_their_labels() -> None:
    images, labels = original("train-images-idx3-ubyte.gz"), original("train-labels-idx1-ubyte.gz")
    known: dict[bytes, set[int]] = {}
    for image, label in zip(images, labels, strict=True):
        known.setdefault(image.tobytes(), set()).add(int(label))
    calibration = fashion_mnist_calibration()
    assert calibration.labels is not None
    for image, label in zip(all_images(calibration), calibration.labels, strict=True):
        assert int(label) in known[image.tobytes()]
    assert len(set(calibration.fingerprints)) == 1024


@needs_debian
def test_the_maker_gives_the_shipped_arrays_again() -> None:
    arrays = shipped_arrays(DEBIAN_FOLDER)
    with np.load(SHIPPED_FILE) as shipped:  # numpy's own reader: not the bytes, which depend on zlib's version
        assert set(shipped) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(shipped[name], array, strict=True)


# The maker


def test_the_bytes_of_the_archive_do_not_depend_on_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays: dict[str, NDArray[Any]] = {"a": np.arange(5), "b": np.zeros((2, 3), np.uint8)}
    first = npz_bytes(arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert npz_bytes(arrays) == first


def test_the_choice_is_balanced_seeded_and_eligible() -> None:
    labels = np.repeat(np.arange(10), 50)
    eligible = np.arange(500) % 3 > 0
    choice = calibration_choice(labels, eligible, 64)
    np.testing.assert_array_equal(choice, calibration_choice(labels, eligible, 64))
    assert len(set(choice.tolist())) == 64
    assert eligible[choice].all()
    assert np.bincount(labels[choice]).tolist() == [7] * 4 + [6] * 6


def test_the_maker_leaves_out_training_images_that_are_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = small_set(tmp_path, monkeypatch, 40, 20)
    monkeypatch.setattr("edgewright.calibration.make_fashion_mnist.CALIBRATION_IMAGES", 20)
    shared = images[:10]
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.concatenate([shared, shared])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.tile(labels[:10], 2)))
    chosen = {image.tobytes() for image in shipped_arrays(tmp_path)["calibration_images"]}
    assert len(chosen) == 20
    assert not chosen & {image.tobytes() for image in shared}


def test_the_maker_refuses_a_folder_without_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_fashion_mnist", str(tmp_path), str(tmp_path / "out.npz")])
    with pytest.raises(DataError, match="four idx files"):
        main()
    assert not (tmp_path / "out.npz").exists()


# A damaged shipped file


def test_a_missing_shipped_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing; install edgewright again"):
        fashion_mnist_test(tmp_path / "absent.npz")


@pytest.mark.parametrize("position", [0, 10, 40, 1000, 2_000_000, -30, -60, -5])
def test_a_changed_byte_of_the_shipped_file_never_gives_other_images(tmp_path: Path, position: int) -> None:
    content = bytearray(SHIPPED_FILE.read_bytes())
    content[position] ^= 0x40
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(content)
    try:
        identity = fashion_mnist_test(damaged).identity
    except DataError as error:
        assert str(damaged) in error.message  # noqa: PT017 - either outcome is right
    else:
        assert identity == fashion_mnist_test().identity  # a byte that says nothing about these arrays


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        SHIPPED_FILE.read_bytes()[:100_000],
        npz_bytes({"test_images": np.zeros(3)}),
        npz_bytes({"test_images": np.zeros((10, 28, 28), np.uint8), "test_labels": np.zeros(10, np.uint8)}),
        npz_bytes({"test_images": np.zeros(10), "test_labels": np.zeros(10)}),
    ],
    ids=["empty", "text", "truncated", "half", "too few", "floats"],
)
def test_a_damaged_shipped_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.npz.*install edgewright again"):
        fashion_mnist_test(tmp_path / "damaged.npz")


def test_a_shipped_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", test_images=np.array([{}], object), test_labels=np.zeros(1))
    with pytest.raises(DataError, match="damaged"):
        fashion_mnist_test(tmp_path / "evil.npz")


# The full set


@pytest.fixture(autouse=True)
def no_network_and_no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(fashion_mnist, "_downloaded", refuse_download)


def refuse_download(cache: Path) -> None:
    raise AssertionError(f"went to the network, cache {cache}")


real_download = fashion_mnist._downloaded


def small_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, training: int = 6, test: int = 4, form: str = "{}-idx{}-ubyte"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Writes a small Fashion-MNIST, and lets the reader expect one; returns its training images and labels."""
    monkeypatch.setattr(fashion_mnist, "SPLITS", {"train": training, "t10k": test})
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", folder.parent / "no-debian")
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pack = gzip.compress if form.endswith(".gz") else bytes
    arrays = {}
    for prefix, count in (("t10k", test), ("train", training)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / form.format(f"{prefix}-images", 3)).write_bytes(pack(idx(images)))
        (folder / form.format(f"{prefix}-labels", 1)).write_bytes(pack(idx(labels)))
        arrays[prefix] = images, labels
    return arrays["train"]


@pytest.mark.parametrize("form", ["{}-idx{}-ubyte", "{}-idx{}-ubyte.gz", "{}.idx{}-ubyte", "{}.idx{}-ubyte.gz"])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_the_given_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, below: str) -> None:
    images, labels = small_set(tmp_path / below, monkeypatch, form=form)
    found_images, found_labels = fashion_mnist_training(tmp_path)
    np.testing.assert_array_equal(found_images, images, strict=True)
    np.testing.assert_array_equal(found_labels, labels)
    assert found_labels.dtype == np.int64
    assert found_images.flags.writeable, "torch.from_numpy would warn"


def test_debians_package_and_the_cache_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = small_set(tmp_path / "debian", monkeypatch)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    np.testing.assert_array_equal(fashion_mnist_training()[0], images)
    (tmp_path / "empty").mkdir()
    np.testing.assert_array_equal(fashion_mnist_training(tmp_path / "empty")[0], images)

    images, _ = small_set(tmp_path / "cache" / "edgewright" / "FashionMNIST" / "raw", monkeypatch, training=7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.testing.assert_array_equal(fashion_mnist_training()[0], images)


def test_the_given_folder_comes_before_debians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_set(tmp_path / "debian", monkeypatch)
    own, _ = small_set(tmp_path / "own", monkeypatch)
    (tmp_path / "own" / "train-images-idx3-ubyte").write_bytes(idx(own[::-1].copy()))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    np.testing.assert_array_equal(fashion_mnist_training(tmp_path / "own")[0], own[::-1])


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent is not a folder"):
        fashion_mnist_training(tmp_path / "absent")


@needs_debian
def test_the_full_set_is_read() -> None:
    images, labels = fashion_mnist_training(DEBIAN_FOLDER)
    assert images.shape == (60_000, 28, 28)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [6000] * 10


@pytest.mark.parametrize("gone", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_half_a_set_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    small_set(tmp_path, monkeypatch)
    (tmp_path / gone).unlink()
    assert read_split(tmp_path, "train") is None


def test_labels_beyond_ten_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_set(tmp_path, monkeypatch)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(6, 10, np.uint8)))
    with pytest.raises(DataError, match="holds the label 10"):
        fashion_mnist_training(tmp_path)


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "within its header"),
        ("a", GOOD[:10], "within its header"),
        ("a", b"\0\0\x08\x01" + GOOD[4:], "magic number 0x00000801, expected 0x00000803"),
        ("a", b"\0\0\x0d\x03" + GOOD[4:], "magic number"),
        ("a", b"<html>not found</html>", "magic number"),
        ("a", GOOD[:-1], "is truncated"),
        ("a", GOOD + b"\0", "longer than its header says"),
        ("a", idx(np.zeros((3, 3, 4), np.uint8)), r"holds an array \[3, 3, 4\], Fashion-MNIST's is \[2, 3, 4\]"),
        ("a.gz", GOOD, "cannot read"),
        ("a.gz", b"", "within its header"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-12], "cannot read"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:20] + b"\xff" * 20, "cannot read"),
        ("a.gz", gzip.compress(GOOD[:-3], mtime=0), "is truncated"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, "cannot read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, (2, 3, 4))
    assert str(path) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_whole_idx_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(GOOD, mtime=0) if name.endswith("gz") else GOOD)
    np.testing.assert_array_equal(read_idx(tmp_path / name, (2, 3, 4)).ravel(), np.arange(24))


# The download


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("Error downloading x:\nTried y, got:\n404"), OSError("no route"), ImportError("no torchvision")],
)
def test_a_download_that_fails_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def fail(root: str, **options: Any) -> None:
        (Path(root) / "FashionMNIST" / "raw").mkdir(parents=True)
        raise failure

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    monkeypatch.setattr(fashion_mnist, "_downloaded", real_download)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="download failed") as caught:
        fashion_mnist_training()
    assert "\n" not in str(caught.value)
    assert "dataset-fashion-mnist" in caught.value.remedy
    assert "train-images-idx3-ubyte.gz" in caught.value.remedy
    assert list((tmp_path / "cache" / "edgewright").iterdir()) == [], "half a download stayed"


def test_a_cache_that_cannot_be_written_is_a_download_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="download failed"):
        real_download(tmp_path / "file" / "cache")


def test_a_download_is_kept_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    expected, _ = small_set(tmp_path / "mirror", monkeypatch)

    def download(root: str, train: bool, download: bool) -> None:
        small_set(Path(root) / "FashionMNIST" / "raw", monkeypatch)

    monkeypatch.setattr(datasets, "FashionMNIST", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, _ = real_download(tmp_path / "edgewright")
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(fashion_mnist_training()[0], expected)  # _downloaded would raise here


def test_a_download_without_its_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(
        datasets, "FashionMNIST", lambda root, **options: (Path(root) / "FashionMNIST" / "raw").mkdir(parents=True)
    )
    with pytest.raises(DataError, match="without its files"):
        real_download(tmp_path)
    assert not (tmp_path / "FashionMNIST").exists()
