"""What an engine is bound to: every part of it makes another key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.device.identity import (
    BuildSettings,
    Place,
    cache_key,
    driver_version,
    key_prefix,
    place_here,
    processor,
)
from edgewright.runtime.specs import BatchProfile

BUNDLE = "ab" * 32
PLACE = Place("tensorrt", "10.3.0", "Orin", "sm87", "12.6", "")
SETTINGS = BuildSettings(BatchProfile(1, 8, 32))


@pytest.mark.parametrize(
    "change",
    [{"backend": "tensorrt-rtx"}, {"version": "10.4.0"}, {"device": "Orin Nano"}, {"architecture": "sm89"},
     {"driver": "12.7"}, {"features": "avx2"}],
)  # fmt: skip
def test_another_place_is_another_key(change: dict[str, str]) -> None:
    assert cache_key(BUNDLE, replace(PLACE, **change), SETTINGS) != cache_key(BUNDLE, PLACE, SETTINGS)


@pytest.mark.parametrize(
    "change", [{"profile": BatchProfile(1, 8, 16)}, {"profile": None}, {"workspace": 1}, {"dla": 0}]
)
def test_other_settings_are_another_key(change: dict[str, Any]) -> None:
    assert cache_key(BUNDLE, PLACE, replace(SETTINGS, **change)) != cache_key(BUNDLE, PLACE, SETTINGS)


def test_another_bundle_is_another_key() -> None:
    other = BUNDLE[:-1] + "c"
    assert cache_key(other, PLACE, SETTINGS) != cache_key(BUNDLE, PLACE, SETTINGS)
    assert cache_key(BUNDLE, PLACE, SETTINGS).startswith(key_prefix(BUNDLE))


def test_the_processor_is_the_place_of_a_cpu_backend() -> None:
    place = place_here(BACKENDS["onnxruntime"])
    assert (place.backend, place.version) == ("onnxruntime", BACKENDS["onnxruntime"].version())
    assert place.device
    assert place.driver == ""


X86 = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f avx512_vnni nx\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp fphp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(X86, ("Intel(R) Xeon(R)", "avx2 avx512_vnni avx512f")), (ARM, ("Arm 0x41 0xd42", "asimddp fphp"))],
)
def test_processor(text: str, expected: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor(tmp_path / "cpuinfo") == expected


def test_a_processor_that_linux_does_not_name(tmp_path: Path) -> None:
    model, features = processor(tmp_path / "none")
    assert model
    assert features == ""


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC",
            "12.6, 550.54.14",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (root@dev)",
            "12.6, 540.4.0",
        ),
        ("something else", "12.6"),
        (None, "12.6"),
    ],
)
def test_the_driver_is_that_of_cuda_and_of_the_kernel(tmp_path: Path, text: str | None, driver: str) -> None:
    module = tmp_path / "version"
    if text is not None:
        module.write_text(text)
    assert driver_version("12.6", module) == driver
