"""Calibration caches of older TensorRT: the bits of each scale against `struct`, exact round trips, broken files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.calibration.calib_cache import METHOD, CalibCache, calib_cache, read_calib_cache, with_cached_ranges
from edgewright.calibration.ranges import Range
from edgewright.optimize.qdq import symmetric_s8
from edgewright.runtime.errors import CalibrationError

HEADER = "TRT-8501-EntropyCalibration2"
CACHE = f"""{HEADER}
images: 3c010a14
/model.0/conv/Conv_output_0: 3d5c11b5
(Unnamed Layer* 64) [Shuffle]_output: 0
StatefulPartitionedCall/a:0: 3f800000
"""


def test_scales_are_the_floats_of_their_bits() -> None:
    cache = calib_cache(CACHE)
    assert cache.header == HEADER
    assert cache.scales == {
        "images": np.float32(struct.unpack(">f", bytes.fromhex("3c010a14"))[0]),
        "/model.0/conv/Conv_output_0": np.float32(struct.unpack(">f", bytes.fromhex("3d5c11b5"))[0]),
        "(Unnamed Layer* 64) [Shuffle]_output": 0.0,
        "StatefulPartitionedCall/a:0": 1.0,
    }


def test_a_range_is_127_scales_either_way_and_a_tensor_without_a_scale_has_none() -> None:
    ranges = calib_cache(CACHE).ranges()
    assert ranges["StatefulPartitionedCall/a:0"] == Range(-127.0, 127.0)
    assert "(Unnamed Layer* 64) [Shuffle]_output" not in ranges
    assert {interval.method for interval in ranges.values()} == {METHOD}


@pytest.mark.parametrize(
    "content",
    [
        CACHE.encode(),
        CACHE.replace("\n", "\r\n").encode(),
        CACHE.rstrip("\n").encode(),
        CACHE.replace("3c010a14", "3C010A14").replace(": 0\n", ": 00000000\n").encode(),
        CACHE.replace("images", "caf\xe9").encode("latin-1"),  # no UTF-8
        HEADER.encode(),
        f"{HEADER}\n".encode(),
    ],
    ids=["as written", "CRLF", "no last newline", "other digits", "latin-1", "header alone", "header and newline"],
)
def test_what_is_read_is_written_again_to_the_byte(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "calib.cache").write_bytes(content)
    read_calib_cache(tmp_path / "calib.cache").write(tmp_path / "again.cache")
    assert (tmp_path / "again.cache").read_bytes() == content


NAMES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)
SCALES = st.floats(0.0, allow_infinity=False, width=32)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, SCALES))
def test_any_scales_come_back_and_are_those_that_s8_gets(scales: dict[str, float]) -> None:
    cache = CalibCache(HEADER, {name: np.float32(scale) for name, scale in scales.items()})
    assert calib_cache(cache.to_text()) == cache
    for name, interval in cache.ranges().items():
        if scales[name] >= np.finfo(np.float32).tiny:  # S8 has no subnormal scales
            assert symmetric_s8(interval).scale == np.float32(scales[name])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1"),
        ("images: 3c010a14\n", "line 1"),
        ("TRT-8501\n", "line 1"),
        (f"{HEADER}\nimages 3c010a14\n", "line 2"),
        (f"{HEADER}\nimages: 3c010a14\n\nlogits: 3c010a14\n", "line 3"),
        (f"{HEADER}\nimages: 3c010a1z\n", "line 2"),
        (f"{HEADER}\nimages: 13c010a14\n", "line 2"),
        (f"{HEADER}\nimages: 3c010a14\nimages: 3c010a15\n", "line 3 gives 'images' a second scale"),
        (f"{HEADER}\nimages: 3c010a14\nlogits: 7fc00000\n", "line 3 gives a scale of nan"),
        (f"{HEADER}\nimages: 7f800000\n", "line 2 gives a scale of inf"),
        (f"{HEADER}\nimages: bc010a14\n", "line 2 gives a scale of -0.00"),
    ],
    ids=lambda value: value.splitlines()[-1] if value.strip() else "nothing",
)
def test_a_broken_file_is_refused_by_its_line(text: str, words: str) -> None:
    with pytest.raises(CalibrationError, match=words) as refused:
        calib_cache(text, "my.cache")
    assert refused.value.message.startswith("my.cache: line")


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calib_cache(tmp_path / "none.cache")


def test_cached_ranges_replace_measured_ones_and_the_others_stay() -> None:
    measured = {"images": Range(-2.0, 2.0, "mse"), "other": Range(-1.0, 1.0, "entropy")}
    ranges = with_cached_ranges(measured, calib_cache(CACHE))
    assert ranges["images"] == calib_cache(CACHE).ranges()["images"]
    assert (ranges["images"].method, ranges["other"].method) == (METHOD, "entropy")
    assert ranges["other"] == measured["other"]
    assert list(ranges) == ["images", "other"], "tensors that only the cache knows are no matter"


def test_a_scale_of_zero_keeps_the_measured_range() -> None:
    name = "(Unnamed Layer* 64) [Shuffle]_output"
    ranges = with_cached_ranges({"images": Range(-2.0, 2.0), name: Range(-3.0, 3.0, "mse")}, calib_cache(CACHE))
    assert ranges[name] == Range(-3.0, 3.0)


def test_another_networks_cache_is_refused_with_names_of_both() -> None:
    with pytest.raises(CalibrationError, match=r"none of the 1 tensors.*images.*the graph has elsewhere"):
        with_cached_ranges({"elsewhere": Range(-1.0, 1.0)}, calib_cache(CACHE))
    assert with_cached_ranges({}, calib_cache(CACHE)) == {}, "where nothing is quantized nothing is missing"
