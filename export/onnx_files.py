"""Reads an ONNX file of unknown origin, without letting it read anything outside its own folder.

A tensor of an ONNX file may say that its values stand in another file ("external data"). The place is text that
whoever wrote the file has chosen: `/etc/passwd`, `../../key` or a symbolic link would carry foreign bytes into a graph
that is then passed on. So each place is checked before a single byte is read, and what is read is inside the model
afterwards: no library resolves a place again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped, unused-ignore]

from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of, sha256_of_file

__all__ = ["OnnxFile", "load_onnx", "read_onnx"]

MAX_BYTES = (1 << 31) - 1  # what protobuf can write in one piece
NOT_ONNX = "give a .onnx file as torch.onnx.export or onnx.save writes it"
BESIDE = "keep external data in real files beside the .onnx file, as onnx.save(…, save_as_external_data=True) does"
FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page or XML: download the file itself",
    b"PK\x03\x04": "a zip archive (or a PyTorch checkpoint): unpack or export it",
    b"\x1f\x8b": "a gzip archive: unpack it",
}


@dataclass(frozen=True)
class OnnxFile:
    """A checked model with all its values inside.

    * files: the `.onnx` file, then each file of external data, in the order of their names
    """

    proto: onnx.ModelProto
    files: tuple[Path, ...]

    def fingerprint(self) -> str:
        """As "sha256:…", of the contents of all files; for a file without external data that file's own hash."""
        hashes = [sha256_of_file(path) for path in self.files]
        return f"sha256:{hashes[0] if len(hashes) == 1 else sha256_of(' '.join(hashes).encode())}"


@dataclass(frozen=True)
class _Extent:
    """The bytes of one external tensor: `length` bytes of `path` from `offset` on."""

    tensor: onnx.TensorProto
    path: Path
    offset: int
    length: int


def load_onnx(path: Path) -> onnx.ModelProto:
    """The model of `path` with all its external data inside, accepted by the ONNX checker.

    Raises `ModelError` if the file is missing, no ONNX, broken or larger than 2 GiB with its data, or if its external
    data stands anywhere but in real files inside its folder.
    """
    return read_onnx(path).proto


def read_onnx(path: Path) -> OnnxFile:
    """`load_onnx`, with the files that were read."""
    proto = _parsed(path)
    extents = [
        _extent(path, tensor) for tensor in _tensors(proto) if onnx.external_data_helper.uses_external_data(tensor)
    ]
    total = path.stat().st_size + sum(extent.length for extent in extents)
    if total > MAX_BYTES:
        raise ModelError(f"{path} holds {total / 2**30:.1f} GiB with its external data", "at most 2 GiB are supported")
    for extent in extents:
        _fill(extent)
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path} is not valid ONNX: {_in_one_line(error)}", NOT_ONNX) from error
    return OnnxFile(proto, (path, *sorted({extent.path for extent in extents})))


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file", NOT_ONNX)
        if status.st_size > MAX_BYTES:
            raise ModelError(f"{path} holds {status.st_size / 2**30:.1f} GiB", "at most 2 GiB are supported")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", NOT_ONNX) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {_in_one_line(error)}", NOT_ONNX) from error
    for start, meaning in FOREIGN_STARTS.items():
        if content.lstrip().startswith(start):
            raise ModelError(f"{path} is not an ONNX file", f"it is {meaning}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, RuntimeError) as error:
        raise ModelError(f"{path} is not an ONNX file, or only a part of one", NOT_ONNX) from error
    if not proto.graph.node:
        raise ModelError(f"{path} holds no graph ({len(content)} bytes)", NOT_ONNX)
    return proto


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a model: initializers, attributes, subgraphs, functions, training information."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for _, value in message.ListFields():
        for part in _messages(value):
            yield from _tensors(part)


def _messages(value: Any) -> Iterator[Message]:
    """The messages of a field, which holds one, a sequence of them, or something else."""
    if isinstance(value, Message):
        yield value
    elif not isinstance(value, str | bytes | int | float) and len(value) and isinstance(value[0], Message):
        yield from value


def _extent(model: Path, tensor: onnx.TensorProto) -> _Extent:
    """Where the values of `tensor` stand. Raises `ModelError` before anything is read there."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    whose = f"the external data of {tensor.name!r} in {model}"
    path = _safe_place(model.parent, said.get("location", ""), whose)
    try:
        offset = int(said.get("offset") or 0)
        length = int(said.get("length") or 0) or _bytes_of(tensor)
    except ValueError as error:
        raise ModelError(f"{whose} has no valid extent: {_in_one_line(error)}", BESIDE) from error
    size = path.stat().st_size
    if offset < 0 or length != _bytes_of(tensor):
        raise ModelError(
            f"{whose} has {length} bytes from {offset} on, expected {_bytes_of(tensor)} for its shape", BESIDE
        )
    if offset + length > size:
        raise ModelError(
            f"{whose} ends at byte {offset + length} of {path.name}, which has {size}", "copy the whole data file"
        )
    return _Extent(tensor, path, offset, length)


def _safe_place(folder: Path, location: str, whose: str) -> Path:
    """The real path of `location`, a regular file inside `folder`."""
    readings = (PurePosixPath(location), PureWindowsPath(location))  # what one system takes for a name, another splits
    if not location or any(reading.anchor or ".." in reading.parts for reading in readings):
        raise ModelError(f"{whose} stands at {location!r}, expected a path inside the model's folder", BESIDE)
    home = Path(os.path.realpath(folder))
    try:
        place = Path(os.path.realpath(folder / location, strict=True))
        regular = stat.S_ISREG(place.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ModelError(f"{whose} cannot be found at {location!r}: {_in_one_line(error)}", BESIDE) from error
    if not place.is_relative_to(home):
        raise ModelError(f"{whose} leads out of the model's folder, to {place}", BESIDE)
    if not regular:
        raise ModelError(f"{whose} stands at {location!r}, which is not a regular file", BESIDE)
    return place


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes of its values. Raises `ValueError` for a type or a shape that has no such number."""
    kind = ir.DataType(tensor.data_type)
    if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise ValueError(f"values of type {kind.name} have no fixed size")
    if any(side < 0 for side in tensor.dims):
        raise ValueError(f"its shape is {list(tensor.dims)}")
    bits: int = prod(tensor.dims) * kind.bitwidth
    return -(-bits // 8)


def _fill(extent: _Extent) -> None:
    """Puts the values into the tensor."""
    with extent.path.open("rb") as stream:
        stream.seek(extent.offset)
        extent.tensor.raw_data = stream.read(extent.length)
    extent.tensor.data_location = onnx.TensorProto.DEFAULT
    extent.tensor.ClearField("external_data")


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
