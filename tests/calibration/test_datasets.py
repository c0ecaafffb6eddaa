"""Image folders and their labels, identity, overlap, splits, and the stream of batches."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgewright.calibration.datasets import check_disjoint, image_folder
from edgewright.calibration.image_set import ImageSet, without
from edgewright.calibration.stream import batches
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import ImageLike, Preprocess

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(os.environ.get("EDGEWRIGHT_SAMPLE", ROOT.parent / "shared" / "data" / "imagenet-sample"))
SMALL = Preprocess((6, 5), None, (0.5,) * 3, (0.25,) * 3)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (9, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(path)


def write_images(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_image(folder / name, seed)
    return folder


def write_labels(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text(text, encoding=encoding)
    return folder


def names(image_set: ImageSet) -> list[str]:
    return [Path(image_set.image_name(index)).name for index in range(len(image_set))]


def label_list(image_set: ImageSet) -> list[int]:
    assert image_set.labels is not None
    assert image_set.labels.dtype == np.int64
    return [int(label) for label in image_set.labels]


def noise_set(count: int, seed: int = 0, name: str = "noise") -> ImageSet:
    images = np.random.default_rng(seed).integers(0, 256, (count, 7, 6), np.uint8)
    return ImageSet.from_array(name, images, np.arange(count) % 10)


# A folder with labels.csv


def test_labels_file_keeps_its_order_and_ignores_other_columns(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "deep/c.png", "unlisted.png")
    write_labels(tmp_path, 'name,index,file\n"a, b",3,deep/c.png\n\nx, 0 , b.png\nx,12,./a.png\n')
    found = image_folder(tmp_path)
    assert names(found) == ["c.png", "b.png", "a.png"]
    assert label_list(found) == [3, 0, 12]
    assert found[0] == tmp_path / "deep" / "c.png"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_file_may_start_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    write_images(tmp_path, "é.png")
    write_labels(tmp_path, "file,index\r\né.png,1\r\n", encoding)
    assert label_list(image_folder(tmp_path, ["x", "y"])) == [1]


def test_labels_file_comes_before_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/a.png", "dog/b.png")
    write_labels(tmp_path, "file,index\ndog/b.png,7\n")
    assert label_list(image_folder(tmp_path)) == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns \\(none\\)"),
        ("a.png,1\n", "columns a.png, 1; its first line must name file and index"),
        ("file,label\na.png,1\n", "must name file and index"),
        ("file,index\n", "lists no images"),
        ("file,index\n,1\n", "line 2 names no file"),
        ("file,index\na.png\n", "line 2: the index '' is no class index"),
        ("file,index\na.png,one\n", "index 'one'"),
        ("file,index\na.png,1.0\n", "index '1.0'"),
        ("file,index\na.png,-1\n", "index '-1'"),
        ("file,index\na.png,1_0\n", "index '1_0'"),
        ("file,index\na.png,²\n", "index '²'"),
        ("file,index\na.png," + "9" * 5000 + "\n", "is no class index"),
        ("file,index\na.png,3\n", "line 2 has the class index 3, but the model has 3 classes, 0 to 2"),
        ("file,index\na.png,1\nabsent.png,1\n", "line 3: absent.png does not exist"),
        ("file,index\nfolder,1\n", "folder does not exist"),
        ("file,index\na.png,1\na.png,2\n", "line 3: a.png is already listed in line 2"),
        ("file,index\na.png,1\n./folder/../a.png,1\n", "already listed in line 2"),
        ("file,index\n../outside.png,1\n", "lies outside the folder"),
        ("file,index\nfolder/../../outside.png,1\n", "lies outside the folder"),
        ("file,index\n/etc/passwd,1\n", "lies outside the folder"),
        ('file,index\n"a.png,1\n', "not a CSV file"),
        ("file,index\na\0.png,1\n", "labels.csv"),
    ],
)
def test_wrong_labels_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write_labels(write_images(tmp_path / "set", "a.png", "folder/b.png"), text)
    write_images(tmp_path, "outside.png")
    with pytest.raises(DataError, match=message) as caught:
        image_folder(folder, ["x", "y", "z"])
    assert "labels.csv" in caught.value.message


def test_labels_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path, "file,index\né.png,1\n", "latin-1")
    with pytest.raises(DataError, match="UTF-8"):
        image_folder(tmp_path)


# Class folders


def test_class_folders_in_sorted_order_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/b.png", "cat/z.png", "cat/a.png", "cat/deep/x.png")
    found = image_folder(tmp_path)
    assert names(found) == ["a.png", "x.png", "z.png", "b.png"]
    assert label_list(found) == [0, 0, 0, 1]


def test_class_folders_equal_torchvisions_image_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    write_images(tmp_path, "n2/b.png", "n10/a.png", "n1/c.png", "n1/d.png", "Z/q.png")
    theirs = datasets.ImageFolder(str(tmp_path))
    ours = image_folder(tmp_path, ["a", "b", "c", "d"])
    assert [(str(ours[index]), label) for index, label in enumerate(label_list(ours))] == theirs.samples


def test_class_folders_named_after_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/b.png", "cat/a.png")
    assert label_list(image_folder(tmp_path, ["ant", "dog", "bee", "cat"])) == [3, 1]
    assert label_list(image_folder(tmp_path, ["dog", "cat"])) == [1, 0]


def test_class_folders_named_after_indices(tmp_path: Path) -> None:
    write_images(tmp_path, "10/a.png", "9/b.png", "007/c.png")
    assert label_list(image_folder(tmp_path)) == [7, 10, 9]
    assert label_list(image_folder(tmp_path, ["x"] * 11)) == [7, 10, 9]


def test_a_label_that_is_a_number_is_a_label(tmp_path: Path) -> None:
    write_images(tmp_path, "1/a.png", "2/b.png")
    assert label_list(image_folder(tmp_path, ["1", "2", "3"])) == [0, 1]


def test_an_empty_class_folder_still_counts_as_a_class(tmp_path: Path) -> None:
    write_images(tmp_path, "a/a.png", "c/b.png")
    (tmp_path / "b").mkdir()
    assert label_list(image_folder(tmp_path, ["x", "y", "z"])) == [0, 2]


@pytest.mark.parametrize(
    ("folders", "labels", "message"),
    [
        (["cat", "dgo"], ["cat", "dog", "ant"], "'dgo'; near labels are 'dog'"),
        (["boot", "shirt", "tee"], ["tee/top", "shirt", "boot"], "no labels of the model, such as 'tee'"),
        (["cat", "dog"], ["x"], "2 folders, the model 1 classes"),
        (["0", "3"], ["x", "y", "z"], "class index 3, but the model has 3 classes"),
        (["1", "01"], [], "same class"),
        (["crane", "dog"], ["crane", "dog", "crane"], "any of the classes 0, 2"),
        (["1", "cat"], ["a", "b", "c"], "no labels of the model"),
    ],
)
def test_classes_that_cannot_be_told_are_refused(
    tmp_path: Path, folders: list[str], labels: Sequence[str], message: str
) -> None:
    write_images(tmp_path, *(f"{folder}/a.png" for folder in folders))
    with pytest.raises(DataError, match=message) as caught:
        image_folder(tmp_path, labels)
    assert caught.value.remedy


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "cat/b.png")
    (tmp_path / "ape").mkdir()  # which holds none
    with pytest.raises(DataError, match=r"both images \(a.png, …\) and class folders \(cat, …\)"):
        image_folder(tmp_path)


# A flat folder


def test_a_flat_folder_is_unlabelled_and_sorted(tmp_path: Path) -> None:
    write_images(tmp_path, "b.png", "a.jpg", "C.JPEG", "10.png", "9.bmp")
    found = image_folder(tmp_path, ["x", "y"])
    assert found.labels is None
    assert names(found) == ["10.png", "9.bmp", "C.JPEG", "a.jpg", "b.png"]
    assert len(list(found)) == 5


def test_hidden_files_and_other_kinds_are_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", ".b.png", ".hidden/c.png")
    for name in ("notes.txt", "Thumbs.db", "png", "model.onnx"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    assert names(image_folder(tmp_path)) == ["a.png"]
    write_images(tmp_path / "classes", "cat/a.png", "cat/.b.png", "cat/.thumbs/c.png", ".git/d.png")
    assert names(image_folder(tmp_path / "classes")) == ["a.png"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no images; expected images, a folder of images per class"):
        image_folder(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    with pytest.raises(DataError, match="absent does not exist"):
        image_folder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"a\.png is not a folder"):
        image_folder(tmp_path / "a.png")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "cat/a.png")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)  # what os.walk reads by; a mode would not stop root
    with pytest.raises(DataError, match="Permission denied"):
        image_folder(tmp_path)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample photographs are missing")
def test_the_sample_photographs() -> None:
    found = image_folder(SAMPLE, ["x"] * 1000)
    assert len(found) == 500
    assert label_list(found)[:4] == [0, 1, 4, 5]
    with pytest.raises(DataError, match="the model has 10 classes"):
        image_folder(SAMPLE, ["x"] * 10)


# Identity


def test_identity_does_not_depend_on_place_or_names(tmp_path: Path) -> None:
    one, two = write_images(tmp_path / "one", "a.png", "b.png"), tmp_path / "elsewhere" / "two"
    shutil.copytree(one, two)
    (two / "b.png").rename(two / "c.png")
    assert image_folder(one).identity == image_folder(two).identity


def test_identity_depends_on_content_labels_and_order(tmp_path: Path) -> None:
    images = noise_set(6)
    assert images.labels is not None
    changed = np.stack([np.asarray(image) for image in images])
    changed[5, 0, 0] ^= 1
    others = [
        images.subset([0, 1, 2, 3, 4]),
        images.subset([1, 0, 2, 3, 4, 5]),
        replace(images, labels=images.labels + 1),
        replace(images, labels=None),
        ImageSet.from_array("noise", changed, images.labels),
        ImageSet.from_array("noise", changed.transpose(0, 2, 1).copy(), images.labels),
    ]
    assert len({images.identity, *(other.identity for other in others)}) == 7
    assert noise_set(6, name="another name").identity == images.identity


def test_identity_does_not_decode(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert len(image_folder(tmp_path).identity) == 64


def test_identity_tells_bytes_in_another_shape(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 6), np.uint8)
    assert ImageSet.from_array("a", images).identity != ImageSet.from_array("a", images.reshape(2, 6, 4)).identity


def test_a_file_that_vanished_is_an_error_that_names_it(tmp_path: Path) -> None:
    found = image_folder(write_images(tmp_path, "a.png", "b.png"))
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*b\.png"):
        _ = found.identity


def test_files_are_hashed_once_for_all_subsets(tmp_path: Path) -> None:
    found = image_folder(write_images(tmp_path, "a.png", "b.png"))
    before = found.fingerprints
    (tmp_path / "b.png").unlink()
    assert found.subset([1]).fingerprints == before[1:]


# Subsets, overlap, splits


def test_subset_keeps_labels_names_and_images_together() -> None:
    images = noise_set(20)
    twice = images.subset(np.array([19, 3, 7])).subset([2, 0])
    assert label_list(twice) == [7, 9]
    assert [twice.image_name(index) for index in range(2)] == ["noise image 7", "noise image 19"]
    np.testing.assert_array_equal(np.asarray(twice[1]), np.asarray(images[19]))
    assert twice.fingerprints == (images.fingerprints[7], images.fingerprints[19])


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="2 images but 3 labels"):
        ImageSet.from_array("x", np.zeros((2, 3, 3), np.uint8), np.zeros(3, np.int64))


def test_disjoint_sets_pass() -> None:
    check_disjoint(noise_set(5), noise_set(5, seed=1), allow_overlap=False)


def test_a_shared_image_is_found_under_another_name(tmp_path: Path) -> None:
    write_images(tmp_path / "calibration", "a.png", "b.png")
    shutil.copytree(tmp_path / "calibration", tmp_path / "evaluation")
    (tmp_path / "evaluation" / "a.png").rename(tmp_path / "evaluation" / "renamed.png")
    write_image(tmp_path / "evaluation" / "b.png", seed=9)
    calibration, evaluation = image_folder(tmp_path / "calibration"), image_folder(tmp_path / "evaluation")
    with pytest.raises(
        DataError, match=r"1 of 2 .*evaluation/renamed\.png \(the same as .*calibration/a\.png\)"
    ) as caught:
        check_disjoint(calibration, evaluation, allow_overlap=False)
    assert "--allow-overlap" in caught.value.remedy
    check_disjoint(calibration, evaluation, allow_overlap=True)


def test_many_shared_images_are_counted_and_the_first_named() -> None:
    images = noise_set(30)
    with pytest.raises(DataError, match=r"10 of 12 .*: noise image 5, noise image 6, noise image 7 and 7 more"):
        check_disjoint(images.subset(range(15)), images.subset([*range(5, 15), 20, 21]), allow_overlap=False)


# The stream


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 23, 64])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_equal_one_by_one_preprocessing_in_order(batch_size: int, workers: int) -> None:
    images = noise_set(23)
    parts = list(batches(images, SMALL, batch_size, workers=workers))
    assert [len(part) for part in parts] == [batch_size] * (23 // batch_size) + [23 % batch_size] * (
        23 % batch_size > 0
    )
    together = np.concatenate(parts)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, SMALL.batch(images), strict=True)


def test_batches_of_files(tmp_path: Path) -> None:
    for seed in range(5):
        write_image(tmp_path / f"{seed}.png", seed, (5 + seed, 9))
    (batch,) = batches(image_folder(tmp_path), SMALL, 8)
    np.testing.assert_array_equal(batch, SMALL.batch(tmp_path / f"{seed}.png" for seed in range(5)))


def test_no_images_give_no_batches() -> None:
    assert list(batches(noise_set(0), SMALL, 4)) == []


def test_batches_are_the_callers_own() -> None:
    images = noise_set(12)
    for batch in batches(images, SMALL, 4):
        np.testing.assert_array_equal(batch.shape, (4, 3, 6, 5))
        assert batch.flags.owndata
        assert batch.flags.writeable
        batch.fill(np.nan)


@pytest.mark.parametrize("preprocess", [replace(SMALL, resize=8), replace(SMALL, resize=None)])
def test_a_size_that_is_not_fixed_is_refused_at_once(preprocess: Preprocess) -> None:
    with pytest.raises(DataError, match="different sizes"):
        batches(noise_set(3), preprocess, 2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_refused_at_once(batch_size: int) -> None:
    with pytest.raises(DataError, match="batch size"):
        batches(noise_set(3), SMALL, batch_size)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_file_is_named_after_the_batches_before_it(tmp_path: Path, content: bytes | None) -> None:
    found = image_folder(write_images(tmp_path, *(f"{index}.png" for index in range(8))))
    (tmp_path / "5.png").unlink()
    if content is not None:
        (tmp_path / "5.png").write_bytes(content)
    stream = batches(found, SMALL, 2, workers=3)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(DataError, match=r"5\.png") as caught:
        next(stream)
    assert caught.value.message.count("5.png") == 1 or content is None
    assert decoding_threads() == 0


def test_a_wrong_array_is_named() -> None:
    images = ImageSet.from_array("deep", np.zeros((3, 4, 4), np.uint16))
    with pytest.raises(DataError, match="deep image 0: the image array is uint16"):
        list(batches(images, SMALL, 2))


def decoding_threads() -> int:
    return sum(thread.name.startswith("edgewright-decode") for thread in threading.enumerate())


def test_threads_end_when_the_consumer_stops() -> None:
    stream = batches(noise_set(200), SMALL, 2, workers=3)
    next(stream)
    assert decoding_threads() > 0
    stream.close()
    assert decoding_threads() == 0


def test_threads_end_when_the_consumer_fails() -> None:
    def consume() -> None:
        for _ in batches(noise_set(200), SMALL, 2, workers=3):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        consume()
    gc.collect()
    assert decoding_threads() == 0


def test_nothing_starts_before_the_first_batch_is_asked_for() -> None:
    batches(noise_set(10), SMALL, 2)
    assert decoding_threads() == 0


class CountingSource:
    """Says how many images were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0
        self.pixels: NDArray[np.uint8] = np.zeros((4, 4), np.uint8)

    def __len__(self) -> int:
        return self.count

    def image(self, position: int) -> ImageLike:
        self.asked += 1
        return self.pixels

    def image_name(self, position: int) -> str:
        return f"image {position}"

    def fingerprint(self, position: int) -> str:
        return "00" * 32


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 2), (1, 3), (10, 4)])
def test_it_does_not_run_far_ahead_of_the_consumer(batch_size: int, workers: int) -> None:
    source = CountingSource(1000)
    stream = batches(ImageSet("counted", source, np.arange(1000)), SMALL, batch_size, workers=workers)
    next(stream)
    time.sleep(0.05)
    assert source.asked <= batch_size + 2 * max(batch_size, workers)
    stream.close()


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    preprocess = SMALL.with_size(64)
    peaks = []
    for count in (64, 640):
        tracemalloc.start()
        for batch in batches(ImageSet("counted", CountingSource(count), np.arange(count)), preprocess, 16, workers=2):
            assert batch.shape == (16, 3, 64, 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1


def test_images_that_others_hold_too_are_taken_out_by_content() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 4, 4), np.uint8)
    images = ImageSet.from_array("five", pixels, np.arange(5))
    rest = without(images, ImageSet.from_array("two", pixels[[3, 0]]))
    assert rest.labels is not None
    assert rest.labels.tolist() == [1, 2, 4]
    assert [np.array_equal(np.asarray(rest[index]), pixels[index_of]) for index, index_of in enumerate((1, 2, 4))] == [
        True
    ] * 3
    assert len(without(images, ImageSet.from_array("others", 255 - pixels))) == 5
