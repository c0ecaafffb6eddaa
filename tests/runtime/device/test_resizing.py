"""A bundle that was packed where Pillow resizes otherwise: the golden inputs, already resized, do not show it."""

from __future__ import annotations

import re
from pathlib import Path

import PIL
import pytest

from command import Command
from edgewright.runtime.bundle import open_bundle
from edgewright.runtime.choice import chosen
from edgewright.runtime.device.build import BuildOptions, build_bundle
from edgewright.runtime.device.resizing import resize_warning
from edgewright.runtime.device.verify import verify_bundle
from toy_bundle import toy_bundle

CPU_ONLY = BuildOptions(backends=("onnxruntime",))
WORDS = "resizes images otherwise than Pillow"


@pytest.fixture
def packed_elsewhere(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path / "other.bundle", spec_changes={"resized": "0" * 64}, tools={"pillow": "9.1"})


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({"pillow": "9.1"}, "otherwise than Pillow 9.1, with which .* pip install pillow==9.1$"),
        ({"pillow": PIL.__version__}, "otherwise than the one with which .* accuracy measured$"),
        ({"edgewright": "0"}, "otherwise than the one with which .* accuracy measured$"),
    ],
)
def test_the_remedy_is_one_that_helps(tmp_path: Path, tools: dict[str, str], words: str) -> None:
    with open_bundle(toy_bundle(tmp_path / "it.bundle", spec_changes={"resized": "0" * 64}, tools=tools)) as bundle:
        assert re.search(words, resize_warning(bundle))


def test_it_is_said_wherever_the_bundle_is_used(packed_elsewhere: Path, device_cache: Path, in_process: None) -> None:
    assert WORDS in chosen(packed_elsewhere, cache=device_cache).why
    (warning,) = build_bundle(packed_elsewhere, CPU_ONLY, cache=device_cache).warnings
    assert WORDS in warning
    assert verify_bundle(packed_elsewhere, cache=device_cache).warnings == (warning,)
    assert chosen(packed_elsewhere, cache=device_cache).why.endswith(warning)


def test_nothing_is_said_where_it_resizes_the_same(bundle: Path, device_cache: Path, in_process: None) -> None:
    assert build_bundle(bundle, CPU_ONLY, cache=device_cache).warnings == ()
    assert "Pillow" not in chosen(bundle, cache=device_cache).why


def test_the_command_says_it(command: Command, packed_elsewhere: Path, device_cache: Path, in_process: None) -> None:
    options = ("build", packed_elsewhere, "--cache", device_cache, "--backend", "onnxruntime")
    done = command(*options)
    assert done.code == 0
    assert WORDS in " ".join(done.out.split())
    assert max(map(len, done.out.splitlines())) <= 80
    assert command(*options, "--json").document["warnings"]
