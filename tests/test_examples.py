"""The programs in `examples/`, run as a person would; and the files with which a device starts them."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgewright.runtime import Session
from edgewright.runtime.bundle import write_archive, write_key_pair
from toy_bundle import toy_bundle

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMAND = Path(sys.executable).with_name("edgewright")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five, of one colour each, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index in range(5):
        colour = rng.integers(0, 256, 3).tolist()
        Image.new("RGB", (40, 30), tuple(colour)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle in one file, and the key that it is signed with."""
    keys = write_key_pair(tmp_path / "release")
    archive = tmp_path / "toy.edgewright"
    write_archive(toy_bundle(tmp_path / "toy.bundle", signing_key=keys.private), archive)
    return archive, keys.public


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable] if program.suffix == ".py" else []
    return subprocess.run(
        [*command, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def expected(bundle: Path, images: list[Any], cache: Path) -> list[str]:
    with Session.open(bundle, cache=cache) as session:
        return [predictions[0].label for predictions in session.classify(images, top=1)]


def test_embed(signed: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    images = sorted(pictures.glob("*.png"))
    done = run(EXAMPLES / "embed.py", signed[0], *images, EDGEWRIGHT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    labels = [line.split(" (")[0] for line in done.stdout.splitlines()]
    assert labels == expected(signed[0], images, tmp_path / "cache")


def test_embed_is_ten_lines() -> None:
    assert len((EXAMPLES / "embed.py").read_text().splitlines()) <= 10


def test_camera_on_a_folder(signed: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = (signed[0], pictures, "--require-signature", signed[1])
    done = run(EXAMPLES / "camera.py", *options, EDGEWRIGHT_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    images = sorted(pictures.glob("*.png"))
    assert [row[0] for row in rows] == [image.name for image in images], "in order, and only images"
    assert [row[1] for row in rows] == expected(signed[0], images, cache)
    assert "5 frames" in done.stderr


def test_camera_on_a_video(signed: tuple[Path, Path], tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    colours = [(200, 30, 40), (20, 180, 60), (30, 60, 220), (240, 240, 20)]
    video = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    assert writer.isOpened()
    for red, green, blue in colours:
        writer.write(np.full((48, 64, 3), (blue, green, red), np.uint8))
    writer.release()
    done = run(EXAMPLES / "camera.py", signed[0], video, EDGEWRIGHT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    frames = [np.full((48, 64, 3), colour, np.uint8) for colour in colours]
    labels = expected(signed[0], frames, tmp_path / "cache")
    assert [row[:2] for row in rows] == [[f"frame {index}", label] for index, label in enumerate(labels)]
    swapped = expected(signed[0], [frame[..., ::-1] for frame in frames], tmp_path / "cache")
    assert labels != swapped, "or blue for red would not be noticed"


@pytest.mark.parametrize(
    ("source", "words"), [("missing.mp4", "there is no missing.mp4"), ("{empty}", "there are no images in")]
)
def test_camera_without_frames(signed: tuple[Path, Path], tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    place = source.format(empty=tmp_path / "empty")
    done = run(EXAMPLES / "camera.py", signed[0], place, EDGEWRIGHT_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_camera_refuses_another_key(signed: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    other = write_key_pair(tmp_path / "other").public
    options = (signed[0], pictures, "--require-signature", other)
    done = run(EXAMPLES / "camera.py", *options, EDGEWRIGHT_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "sign" in done.stderr


def test_first_boot_builds_once(signed: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {
        "EDGEWRIGHT": str(COMMAND),
        "EDGEWRIGHT_BUNDLE": str(signed[0]),
        "EDGEWRIGHT_KEY": str(signed[1]),
        "EDGEWRIGHT_CACHE": str(tmp_path / "cache"),
    }
    first = run(EXAMPLES / "device/first-boot.sh", **settings)
    assert first.returncode == 0, first.stderr
    assert "onnxruntime fp32: passed its self-test" in first.stderr
    again = run(EXAMPLES / "device/first-boot.sh", **settings)
    assert again.returncode == 0
    assert "onnxruntime fp32: kept" in again.stderr


@pytest.mark.parametrize("missing", ["EDGEWRIGHT_BUNDLE", "EDGEWRIGHT_KEY"])
def test_first_boot_refuses_to_go_on_without(missing: str, signed: tuple[Path, Path]) -> None:
    """Above all without a key: nothing is built that nobody signed."""
    settings = {"EDGEWRIGHT_BUNDLE": str(signed[0]), "EDGEWRIGHT_KEY": str(signed[1]), "EDGEWRIGHT": str(COMMAND)}
    done = run(EXAMPLES / "device/first-boot.sh", **{**settings, missing: ""})
    assert done.returncode != 0
    assert missing in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("unit", ["edgewright-build.service", "edgewright-camera.service"])
def test_units_name_what_exists(unit: str) -> None:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(EXAMPLES / "device" / unit)
    service = parser["Service"]
    settings = (EXAMPLES / "device/edgewright.env").read_text()
    for word in service["ExecStart"].split():
        if word.startswith("${"):
            assert f"\n{word[2:-1]}=" in settings
        elif word.startswith("/opt/edgewright/") and "venv" not in word:
            assert list(EXAMPLES.rglob(Path(word).name)), word
    assert service["CacheDirectoryMode"] == "0700", "a cache that others may write to is refused"
    assert service["Environment"] == f"EDGEWRIGHT_CACHE=/var/cache/{service['CacheDirectory']}"
