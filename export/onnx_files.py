"""Reads an ONNX file of unknown origin, without letting it read anything outside its own folder.

A tensor of an ONNX file may say that its values stand in another file ("external data"). The place is text that
whoever wrote the file has chosen: `/etc/passwd`, `../../key` or a link would carry foreign bytes into a graph that is
then passed on. So each place is checked before a single byte is read, each file is opened once, and what is read is
inside the model afterwards: no library resolves a place again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped, unused-ignore]

from edgewright.export.conventions import check_size, first_line
from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of

__all__ = ["OnnxFile", "load_onnx", "read_onnx", "self_contained", "tensors_of"]

MAX_BYTES = (1 << 31) - 1  # what protobuf can write in one piece
READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a named pipe would wait for ever
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
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

    * fingerprint: "sha256:…" of the bytes that were read; without external data, the hash of the file
    """

    proto: onnx.ModelProto
    fingerprint: str


@dataclass(frozen=True)
class _Extent:
    """The bytes of one external tensor: `length` bytes of `stream` from `offset` on."""

    tensor: onnx.TensorProto
    stream: BinaryIO
    offset: int
    length: int


def load_onnx(path: Path, *, fingerprint: str = "") -> onnx.ModelProto:
    """The model of `path` with all its external data inside, accepted by the ONNX checker.

    Raises `ModelError` if the file is missing, no ONNX, broken or larger than 2 GiB with its data, if its external
    data stands anywhere but in real files inside its folder, if an input is larger than any image, or if its content
    has another `fingerprint` than the one given.
    """
    file = read_onnx(path)
    if fingerprint not in ("", file.fingerprint):
        raise ModelError(f"{path} changed during the run", "run again")
    return file.proto


def read_onnx(path: Path) -> OnnxFile:
    """`load_onnx`, with the fingerprint of what was read."""
    with contextlib.ExitStack() as stack:
        model = _model_stream(path, stack)
        content = _read(model, 0, _size(model), str(path))
        proto = _parsed(content, path)
        extents = _extents(proto, path, model, stack)
        total = len(content) + sum(extent.length for extent in extents)
        if total > MAX_BYTES:
            raise ModelError(
                f"{path} holds {total / 2**30:.1f} GiB with its external data", "at most 2 GiB are supported"
            )
        hashes = [sha256_of(content), *(_filled(extent) for extent in extents)]
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path} is not valid ONNX: {first_line(error)}", NOT_ONNX) from error
    for value in proto.graph.input:
        check_size([max(dim.dim_value, 0) or None for dim in value.type.tensor_type.shape.dim], str(path))
    return OnnxFile(proto, f"sha256:{hashes[0] if len(hashes) == 1 else sha256_of(' '.join(hashes).encode())}")


def self_contained(path: Path) -> bytes:
    """The file as it is; if some of its tensors stand in other files, the model that `load_onnx` makes of it.

    Raises `ModelError` if it is missing, no ONNX or broken, and for external data what `load_onnx` does.
    """
    with contextlib.ExitStack() as stack:
        model = _model_stream(path, stack)
        content = _read(model, 0, _size(model), str(path))
    if not any(map(onnx.external_data_helper.uses_external_data, tensors_of(_parsed(content, path)))):
        return content
    whole: bytes = load_onnx(path).SerializeToString(deterministic=True)
    return whole


def _model_stream(path: Path, stack: contextlib.ExitStack) -> BinaryIO:
    try:
        stream = _regular_stream(path, READ_ONLY, stack)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", NOT_ONNX) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}", NOT_ONNX) from error
    if stream is None:
        raise ModelError(f"{path} is not a regular file", NOT_ONNX)
    if _size(stream) > MAX_BYTES:
        raise ModelError(f"{path} holds {_size(stream) / 2**30:.1f} GiB", "at most 2 GiB are supported")
    return stream


def _regular_stream(path: Path, flags: int, stack: contextlib.ExitStack) -> BinaryIO | None:
    """The opened file, which `stack` closes; None if it is no regular one. Raises `OSError` or `ValueError`."""
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return stack.enter_context(os.fdopen(handle, "rb"))


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size


def _parsed(content: bytes, path: Path) -> onnx.ModelProto:
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


def tensors_of(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a model: initializers, attributes, subgraphs, functions, training information."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for _, value in message.ListFields():
        for part in _messages(value):
            yield from tensors_of(part)


def _messages(value: Any) -> Iterator[Message]:
    """The messages of a field, which holds one, a sequence of them, or something else."""
    if isinstance(value, Message):
        yield value
    elif not isinstance(value, str | bytes | int | float) and len(value) and isinstance(value[0], Message):
        yield from value


def _extents(proto: onnx.ModelProto, path: Path, model: BinaryIO, stack: contextlib.ExitStack) -> tuple[_Extent, ...]:
    """Where the external values stand. Raises `ModelError` before anything is read there."""
    streams: dict[Path, BinaryIO] = {}
    extents = []
    for tensor in tensors_of(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            said = {entry.key: entry.value for entry in tensor.external_data}
            whose = f"the external data of {tensor.name!r} in {path}"
            place = _safe_place(path.parent, said.get("location", ""), whose)
            if place not in streams:
                streams[place] = _data_stream(place, model, whose, stack)
            extents.append(_extent(tensor, said, streams[place], whose))
    return tuple(extents)


def _safe_place(folder: Path, location: str, whose: str) -> Path:
    """The real path of `location`, inside `folder`."""
    readings = (PurePosixPath(location), PureWindowsPath(location))  # what one system takes for a name, another splits
    if not location or any(reading.anchor or ".." in reading.parts for reading in readings):
        raise ModelError(f"{whose} stands at {location!r}, expected a path inside the model's folder", BESIDE)
    home = Path(os.path.realpath(folder))
    try:
        place = Path(os.path.realpath(folder / location, strict=True))
    except (OSError, ValueError) as error:
        raise ModelError(f"{whose} cannot be found at {location!r}: {first_line(error)}", BESIDE) from error
    if not place.is_relative_to(home):
        raise ModelError(f"{whose} leads out of the model's folder, to {place}", BESIDE)
    return place


def _data_stream(place: Path, model: BinaryIO, whose: str, stack: contextlib.ExitStack) -> BinaryIO:
    """The file at `place`, a real path; what has been put there since by a link is not followed."""
    try:
        stream = _regular_stream(place, READ_ONLY | NO_LINK, stack)
    except OSError as error:
        raise ModelError(f"{whose} cannot be opened: {first_line(error)}", BESIDE) from error
    if stream is None:
        raise ModelError(f"{whose} stands at {place}, which is not a regular file", BESIDE)
    status = os.fstat(stream.fileno())
    if os.path.samestat(status, os.fstat(model.fileno())):
        raise ModelError(f"{whose} stands in that file itself", BESIDE)
    if status.st_nlink > 1:
        raise ModelError(
            f"{whose} stands in {place.name}, a hard link: the same file has {status.st_nlink} names, which may lie "
            "outside the model's folder",
            "copy the file and put the copy in its place",
        )
    return stream


def _extent(tensor: onnx.TensorProto, said: Mapping[str, str], stream: BinaryIO, whose: str) -> _Extent:
    try:
        offset = int(said.get("offset") or 0)
        length = int(said.get("length") or 0) or _bytes_of(tensor)
    except ValueError as error:
        raise ModelError(f"{whose} has no valid extent: {first_line(error)}", BESIDE) from error
    if offset < 0 or length != _bytes_of(tensor):
        raise ModelError(
            f"{whose} has {length} bytes from {offset} on, expected {_bytes_of(tensor)} for its shape", BESIDE
        )
    if offset + length > _size(stream):
        raise ModelError(
            f"{whose} ends at byte {offset + length} of a file that has {_size(stream)}", "copy the whole data file"
        )
    return _Extent(tensor, stream, offset, length)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes of its values. Raises `ValueError` for a type or a shape that has no such number."""
    kind = ir.DataType(tensor.data_type)
    if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise ValueError(f"values of type {kind.name} have no fixed size")
    if any(side < 0 for side in tensor.dims):
        raise ValueError(f"its shape is {list(tensor.dims)}")
    bits: int = prod(tensor.dims) * kind.bitwidth
    return -(-bits // 8)


def _filled(extent: _Extent) -> str:
    """Puts the values into the tensor; their SHA-256."""
    content = _read(extent.stream, extent.offset, extent.length, f"the external data of {extent.tensor.name!r}")
    extent.tensor.raw_data = content
    extent.tensor.data_location = onnx.TensorProto.DEFAULT
    extent.tensor.ClearField("external_data")
    return sha256_of(content)


def _read(stream: BinaryIO, offset: int, length: int, name: str) -> bytes:
    try:
        stream.seek(offset)
        content = stream.read(length)
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {first_line(error)}", "copy the file anew") from error
    if len(content) != length:
        raise ModelError(f"{name} became shorter while it was read", "run again")
    return content
