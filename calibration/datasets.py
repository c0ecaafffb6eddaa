"""A user's own images as an `ImageSet`: a folder with `labels.csv`, class folders, or a flat folder without labels."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgewright.runtime.errors import DataError

from .image_set import NAMED_IN_ERRORS, ImageSet, check_disjoint

__all__ = ["IMAGE_SUFFIXES", "LABELS_FILE", "ImageSet", "check_disjoint", "image_folder"]

LABELS_FILE = "labels.csv"
# What Pillow decodes.
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}) | frozenset(
    {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
LAYOUTS = (
    f"expected images, a folder of images per class, or a {LABELS_FILE} (columns file and index) beside the images"
)


def image_folder(path: Path, labels: Sequence[str] = ()) -> ImageSet:
    """The images of a folder, in a fixed order.

    * with `labels.csv` (columns file and index, others are ignored): its rows, in their order
    * with class folders: sorted by relative path; the class is the label that the folder is named after, or the index
      that its name is, or else its place in sorted order if no name is a label and there are as many folders as
      `labels` (or no `labels`)
    * with nothing but images: sorted by name, unlabelled

    Hidden files and files of other kinds are ignored. `labels` are the model's class names, in order.
    Raises `DataError` if there are no images, or their classes are wrong or cannot be told.
    """
    path = Path(path)
    if not path.is_dir():
        fact = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {fact}", LAYOUTS)
    try:
        if (path / LABELS_FILE).exists():
            return _from_labels_file(path, labels)
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        flat = sorted(entry.name for entry in path.iterdir() if entry.is_file() and _is_image(entry.name))
        nested = {folder: _images_below(path, folder) for folder in folders}
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    if any(nested.values()):
        if flat:
            raise DataError(
                f"{path} holds both images ({flat[0]}, …) and class folders ({_first_filled(nested)}, …); "
                "the classes are unclear",
                f"move the images into class folders or write a {LABELS_FILE}",
            )
        return _from_class_folders(path, nested, labels)
    if not flat:
        raise DataError(f"{path} holds no images", LAYOUTS)
    return ImageSet.from_files(path, flat)


def _first_filled(folders: Mapping[str, Sequence[str]]) -> str:
    return next(folder for folder, images in folders.items() if images)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _images_below(root: Path, folder: str) -> list[str]:
    """Paths relative to `root` of all images in a class folder, however deep."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that cannot be read

    found = []
    for parent, children, files in os.walk(root / folder, onerror=refuse):
        children[:] = [child for child in children if not child.startswith(".")]
        relative = Path(parent).relative_to(root)
        found += [(relative / file).as_posix() for file in files if _is_image(file)]
    return sorted(found)


def _from_class_folders(root: Path, nested: dict[str, list[str]], labels: Sequence[str]) -> ImageSet:
    classes = _class_indices(root, list(nested), labels)
    files = sorted((file, classes[folder]) for folder, below in nested.items() for file in below)
    return ImageSet.from_files(root, [file for file, _ in files], [index for _, index in files])


def _class_indices(root: Path, folders: list[str], labels: Sequence[str]) -> dict[str, int]:
    """Class index of each folder. Raises `DataError` if it cannot be told without guessing."""
    if all(folder in labels for folder in folders):  # before integers: a label may itself be called "7"
        return {folder: _index_of_label(root, folder, labels) for folder in folders}
    if all(_is_index(folder) for folder in folders):
        indices = {folder: _checked_index(int(folder), f"folder {root / folder}", labels) for folder in folders}
        if len(set(indices.values())) < len(folders):
            raise DataError(f"two folders of {root} stand for the same class: {', '.join(folders)}", "merge them")
        return indices
    unknown = [folder for folder in folders if folder not in labels]
    # Some names that are labels show that the others are misspelled ones: sorted order would give wrong classes.
    if not labels or (len(folders) == len(labels) == len(unknown)):
        return {folder: index for index, folder in enumerate(folders)}
    nearest = difflib.get_close_matches(unknown[0], labels, n=NAMED_IN_ERRORS)
    raise DataError(
        f"the classes of {root} cannot be told: it has {len(folders)} folders, the model {len(labels)} classes, and "
        f"{len(unknown)} folder names are no labels of the model, such as {unknown[0]!r}",
        (f"near labels are {', '.join(map(repr, nearest))}; " if nearest else "")
        + f"name each folder after a label or a class index, or write a {LABELS_FILE}",
    )


def _index_of_label(root: Path, folder: str, labels: Sequence[str]) -> int:
    found = [index for index, label in enumerate(labels) if label == folder]
    if len(found) > 1:  # ImageNet has two cranes and two maillots
        raise DataError(
            f"folder {root / folder} could be any of the classes {', '.join(map(str, found))}, which share that label",
            f"name the folders after class indices or write a {LABELS_FILE}",
        )
    return found[0]


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10  # int() refuses very long ones


def _checked_index(index: int, where: str, labels: Sequence[str]) -> int:
    if labels and index >= len(labels):
        raise DataError(
            f"{where} has the class index {index}, but the model has {len(labels)} classes, 0 to {len(labels) - 1}",
            "correct the index or take another model",
        )
    return index


def _from_labels_file(root: Path, labels: Sequence[str]) -> ImageSet:
    files: list[str] = []
    indices: list[int] = []
    lines: dict[str, int] = {}
    for line, file, index in _rows(root / LABELS_FILE):
        where = f"{root / LABELS_FILE}, line {line}"
        relative = _path_within(root, file, where)
        if relative in lines:
            raise DataError(
                f"{where}: {file} is already listed in line {lines[relative]}", "remove one of the two lines"
            )
        if not _is_index(index):
            raise DataError(f"{where}: the index {index!r} is no class index (a whole number from 0 up)", "correct it")
        lines[relative] = line
        files.append(relative)
        indices.append(_checked_index(int(index), where, labels))
    if not files:
        raise DataError(f"{root / LABELS_FILE} lists no images", "add a line per image")
    return ImageSet.from_files(root, files, indices)


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, file, index) of each row, as text without surrounding blanks."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets put a byte order mark in front
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            header = [(name or "").strip() for name in reader.fieldnames or ()]
            if "file" not in header or "index" not in header:
                raise DataError(
                    f"{path} has the columns {', '.join(header) or '(none)'}", "its first line must name file and index"
                )
            reader.fieldnames = header
            for row in reader:
                yield reader.line_num, (row["file"] or "").strip(), (row["index"] or "").strip()
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}", "save it as CSV, UTF-8") from None


def _path_within(root: Path, file: str, where: str) -> str:
    """The normalized path relative to `root` of a file that exists. Raises `DataError` otherwise."""
    if not file:
        raise DataError(f"{where} names no file", "fill in the column file")
    relative = Path(os.path.normpath(file))  # two spellings of one file become equal
    if relative.is_absolute() or os.pardir in relative.parts:
        raise DataError(f"{where}: {file} lies outside the folder", f"name files relative to {root}")
    if "\0" in file or not (root / relative).is_file():
        raise DataError(f"{where}: {file} does not exist", f"add the file to {root} or remove the line")
    return relative.as_posix()
