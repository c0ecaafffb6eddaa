"""Calibration caches of TensorRT 10 and older, `calib.cache`, which TensorRT 11 cannot use any more.

    TRT-8501-EntropyCalibration2
    images: 3c010a14
    (Unnamed Layer* 64) [Shuffle]_output: 0

A line is the name of a tensor and the bits of its float32 scale, big-endian hexadecimal without leading zeros. The
tensor's range is ±127 scales. A scale of 0 stands for a tensor that was not calibrated.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgewright.calibration.ranges import Range
from edgewright.runtime.errors import CalibrationError

__all__ = ["METHOD", "CalibCache", "calib_cache", "read_calib_cache", "with_cached_ranges"]

METHOD = "calib.cache"
"""What `Range.method` says of a range from a cache."""
HEADER = re.compile(r"TRT-\d+-\w+")
ENTRY = re.compile(r"(?P<name>.+): (?P<bits>[0-9A-Fa-f]{1,8})")  # greedy: names may hold colons and spaces
LEVELS = 127
NAMED_IN_ERRORS = 3
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # names are bytes to TensorRT
REMEDY = "give the file that TensorRT's calibrator wrote"


@dataclass(frozen=True)
class CalibCache:
    """What a `calib.cache` says.

    * header: its first line, version of TensorRT and kind of calibrator
    * scales: float32 per tensor, in the order of the file
    * spelled: scales that the file writes in another way than `to_text` would, by the names of their tensors
    * newline, ends_with_newline: how the file separates its lines
    """

    header: str
    scales: Mapping[str, np.float32]
    spelled: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    newline: str = "\n"
    ends_with_newline: bool = True

    def ranges(self) -> dict[str, Range]:
        """±127 scales for each tensor that was calibrated; S8 over it has the very scale of the cache."""
        return {
            name: Range(-LEVELS * float(scale), LEVELS * float(scale), METHOD)
            for name, scale in self.scales.items()
            if scale > 0
        }

    def to_text(self) -> str:
        """The file again, to the byte if it is encoded as it was read: UTF-8 with `surrogateescape`."""
        entries = (f"{name}: {self.spelled.get(name, _bits(scale))}" for name, scale in self.scales.items())
        return self.newline.join((self.header, *entries)) + (self.newline if self.ends_with_newline else "")

    def write(self, path: Path) -> None:
        """Writes the file."""
        path.write_bytes(self.to_text().encode(**ENCODING))


def read_calib_cache(path: Path) -> CalibCache:
    """The cache at `path`. Raises `CalibrationError`, naming the line, if it is none or a scale is no scale."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"the calibration cache {path} cannot be read ({error.strerror})", REMEDY) from None
    return calib_cache(content.decode(**ENCODING), str(path))


def calib_cache(text: str, source: str = "calib.cache") -> CalibCache:
    """The same from the text of the file; `source` is what errors call it."""
    newline = "\r\n" if "\r\n" in text else "\n"
    header, *lines = text.split(newline)
    ends_with_newline = bool(lines) and lines[-1] == ""
    if not HEADER.fullmatch(header):
        raise _broken(source, 1, f"is {_shown(header)}, expected a header such as TRT-8501-EntropyCalibration2")
    scales: dict[str, np.float32] = {}
    spelled: dict[str, str] = {}
    for number, (name, bits) in enumerate(_entries(lines[: len(lines) - ends_with_newline], source), start=2):
        if name in scales:
            raise _broken(source, number, f"gives {_shown(name)} a second scale")
        scales[name] = _scale(bits, source, number)
        if bits != _bits(scales[name]):
            spelled[name] = bits
    return CalibCache(header, scales, spelled, newline, ends_with_newline)


def with_cached_ranges(measured: Mapping[str, Range], cache: CalibCache) -> dict[str, Range]:
    """`measured` ranges, those of tensors that `cache` knows replaced by its own, for targets with S8 activations.

    A tensor that the cache does not know keeps its measured range, since a cache seldom has all: TensorRT left out what
    it fused away, and names change from exporter to exporter. `Range.method` tells which is which.
    Raises `CalibrationError` if the cache knows none of them: then it is another network's.
    """
    cached = cache.ranges()
    if measured and not cached.keys() & measured.keys():
        raise CalibrationError(
            f"the calibration cache knows none of the {len(measured)} tensors to be quantized: it has "
            f"{_some(cached)}, the graph has {_some(measured)}",
            "give the cache of this very network, or none",
        )
    return {name: cached.get(name, interval) for name, interval in measured.items()}


def _entries(lines: list[str], source: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=2):
        entry = ENTRY.fullmatch(line)
        if entry is None:
            raise _broken(source, number, f"is {_shown(line)}, expected a tensor and a scale, such as images: 3c010a14")
        yield entry["name"], entry["bits"]


def _scale(bits: str, source: str, number: int) -> np.float32:
    scale: float = struct.unpack(">f", bytes.fromhex(bits.zfill(8)))[0]
    if not math.isfinite(scale) or scale < 0:
        raise _broken(source, number, f"gives a scale of {scale}, expected a finite number from 0")
    value: np.float32 = np.float32(scale)
    return value


def _bits(scale: np.float32) -> str:
    return f"{int(np.asarray(scale, '>f4').view('>u4')):x}"


def _broken(source: str, line: int, fact: str) -> CalibrationError:
    return CalibrationError(f"{source}: line {line} {fact}", REMEDY)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _some(names: Mapping[str, object]) -> str:
    shown = ", ".join(list(names)[:NAMED_IN_ERRORS])
    return f"{shown}, …" if len(names) > NAMED_IN_ERRORS else shown or "none"
