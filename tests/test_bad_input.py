"""Everything that can be wrong with what `edgewright engine` is given: one line that names it, or a correct result."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command import Command, Completed
from edgewright.export.weights import save_checkpoint
from edgewright.workspace import Workspace
from tiny_modules import TinyNetwork, randomize
from tiny_network import LABELS, PREPROCESS

Tiny = Callable[..., Completed]

ARTEFACTS = {  # and the stage that makes each again
    "model.onnx": "export",
    "folded.onnx": "fold",
    "calibration.json": "calibrate",
    "int8-cpu.onnx": "quantize cpu",
    "plan-cpu.json": "quantize cpu",
    "engines/onnxruntime-fp32.onnx": "build onnxruntime fp32",
    "engines/onnxruntime-fp32.json": "build onnxruntime fp32",
    "engines/onnxruntime-int8.onnx": "build onnxruntime int8",
    "engines/onnxruntime-int8.json": "build onnxruntime int8",
    "logits/reference.npy": "reference",
    "logits/onnxruntime-fp32.npy": "verify onnxruntime fp32",
    "logits/onnxruntime-int8.npy": "verify onnxruntime int8",
    "export.key.json": "export",
    "fold.key.json": "fold",
    "calibrate.key.json": "calibrate",
    "quantize cpu.key.json": "quantize cpu",
    "build onnxruntime int8.key.json": "build onnxruntime int8",
    "reference.key.json": "reference",
    "verify onnxruntime int8.key.json": "verify onnxruntime int8",
    "latency.key.json": "latency",
}


@pytest.fixture
def tiny(command: Command, build_dir: Path, images: Any) -> Tiny:
    """`edgewright engine tiny` in the test's copy of the finished build folder; the budget is 8 points."""

    def run(*arguments: object) -> Completed:
        chosen = ("--max-drop", 8, "--backend", "onnxruntime")
        return command("engine", "tiny", "--build-dir", build_dir, *chosen, *images.options, *arguments)

    return run


def content_of(path: Path) -> object:
    """What an artefact says; onnxruntime numbers the kernels that it adds itself differently each time."""
    if path.parent.name != "engines" or path.suffix != ".json":
        return path.read_bytes()
    info = json.loads(path.read_text())
    for kernel in info["kernels"]:
        if not kernel["sources"]:
            kernel["name"] = kernel["kind"]
    return info


def succeeded(done: Completed) -> bool:
    """Whether a verdict was reached, whichever it is."""
    assert "Traceback" not in done.err, done.err
    assert done.code in (0, 3, 4), done.err
    return True


# Models and weights


@pytest.mark.parametrize(
    ("name", "near"),
    [("tinny", "tiny"), ("mobilenet_efnet_b0", "mobilenet_effnet_b0"), ("efficientnet-lite0", "efficientnet_lite0")],
)
def test_an_unknown_model_is_told_its_nearest_names(command: Command, name: str, near: str) -> None:
    assert f"unknown model {name!r}; did you mean {near}" in command("engine", name).error


def test_an_unknown_model_like_none_is_told_where_the_names_are(command: Command) -> None:
    assert "unknown model 'zzz'; edgewright models lists those that there are" in command("engine", "zzz").error


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of the tiny network that say how their images are preprocessed."""
    return write_checkpoint(tmp_path / "tiny.safetensors", TinyNetwork(3, 4))


def write_checkpoint(path: Path, model: TinyNetwork) -> Path:
    randomize(model, seed=3)
    save_checkpoint(path, model, PREPROCESS, LABELS)
    return path


def test_weights_from_a_file(tiny: Tiny, checkpoint: Path) -> None:
    done = tiny("--weights", checkpoint, "--json")
    assert succeeded(done)
    assert done.document["weights"] == str(checkpoint)
    assert done.document["reference"]["top1"] >= 0.9, "float16 values of the default weights"


def test_weights_from_a_pickle(tiny: Tiny, checkpoint: Path, tmp_path: Path) -> None:
    model = TinyNetwork(3, 4)
    randomize(model, seed=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pth")
    done = tiny("--weights", tmp_path / "tiny.pth", "--json")
    assert succeeded(done)
    assert done.document["reference"]["top1"] == 1.0


class Code:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "text", "other", "classes", "metadata", "suffix"])
def test_a_weights_file_that_does_not_fit(tiny: Tiny, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    content = checkpoint.read_bytes()
    match kind:
        case "missing":
            checkpoint.unlink()
        case "truncated":
            checkpoint.write_bytes(content[:-100])
        case "empty" | "text":
            checkpoint.write_bytes(b"" if kind == "empty" else b"no tensors")
        case "other":
            write_checkpoint(checkpoint, TinyNetwork(3, 4, width=16))
        case "classes":
            write_checkpoint(checkpoint, TinyNetwork(3, 5))
        case "metadata":
            checkpoint.write_bytes(content.replace(b"interpolation", b"interpolatiOn"))
        case "suffix":
            checkpoint = checkpoint.rename(tmp_path / "tiny.bin")
    error = tiny("--weights", checkpoint).error
    assert checkpoint.name in error
    if kind == "other":
        assert "features.0.weight is [16, 3, 3, 3], expected [8, 3, 3, 3]" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny: Tiny, tmp_path: Path, value: float) -> None:
    state = TinyNetwork(3, 4).state_dict()
    state["features.3.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "broken.pth")
    assert (
        "broken.pth has NaN or infinite values in features.3.weight" in tiny("--weights", tmp_path / "broken.pth").error
    )


@pytest.mark.parametrize("content", [Code(), [1, 2], {"a": "text"}, {}], ids=["code", "list", "text", "nothing"])
def test_a_pickle_that_is_no_state_dict(tiny: Tiny, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    done = tiny("--weights", tmp_path / "odd.pth")
    assert "odd.pth" in done.error
    assert "executed" not in done.out


@pytest.mark.parametrize("weights", ["imagenet", "Default", "", "."])
def test_unknown_weights(tiny: Tiny, weights: str) -> None:
    assert f"tiny has no weights {weights!r}; there are default, other, dim, random" in tiny("--weights", weights).error


@pytest.mark.parametrize("opset", [17, 21])
def test_an_opset_that_is_not_supported(tiny: Tiny, opset: int) -> None:
    assert tiny("--opset", opset).error == f"opset {opset} is not supported; choose one of 18 … 20"


def test_a_model_that_cannot_be_exported(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def branching(self: TinyNetwork, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits if images.sum() > 0 else -logits

    monkeypatch.setattr(TinyNetwork, "forward", branching)
    error = tiny("--weights", "other").error
    if torch.__version__ >= "2.7":  # 2.6 exports one branch, for one batch
        assert "could not export TinyNetwork" in error


# Images


def rewrite(folder: Path, kind: str) -> str:
    """Replaces one image by one of another kind; returns its name."""
    path = folder / "003.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    rgb = Image.fromarray(pixels)
    match kind:
        case "alpha":
            rgb.putalpha(128)
            rgb.save(path)
        case "cmyk":
            rgb.convert("CMYK").save(path, format="JPEG")
        case "gray":
            rgb.convert("L").save(path)
        case "gray alpha":
            rgb.convert("LA").save(path)
        case "palette":
            rgb.convert("P").save(path, transparency=b"\0" * 256)
        case "one bit":
            rgb.convert("1").save(path)
        case "one pixel":
            rgb.resize((1, 1)).save(path)
        case "16 bit":
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        case "float":
            Image.fromarray(pixels[..., 0].astype(np.float32)).save(path, format="TIFF")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-200])
        case "header":
            path.write_bytes(path.read_bytes()[:20])
        case "text":
            path.write_text("not an image")
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "dangling":
            path.unlink()
            path.symlink_to(folder / "nowhere.png")
    return path.name


@pytest.mark.parametrize("kind", ["alpha", "cmyk", "gray", "gray alpha", "palette", "one bit", "one pixel"])
def test_unusual_images_work(tiny: Tiny, images: Any, kind: str) -> None:
    rewrite(images.evaluation, kind)
    assert succeeded(tiny())


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", ["16 bit", "float", "truncated", "header", "text", "empty"])
def test_images_that_cannot_be_used_are_named(tiny: Tiny, images: Any, kind: str, use: str, build_dir: Path) -> None:
    name = rewrite(getattr(images, use), kind)
    assert f"{use}/{name}" in tiny().error
    assert not list(build_dir.rglob(".partial-*"))
    (getattr(images, use) / name).unlink()
    labels = images.evaluation / "labels.csv"
    if use == "evaluation":
        labels.write_text("\n".join(line for line in labels.read_text().split() if not line.startswith(name)))
    assert succeeded(tiny())


@pytest.mark.parametrize("kind", ["folder", "dangling"])
def test_a_listed_file_that_is_none(tiny: Tiny, images: Any, kind: str) -> None:
    assert rewrite(images.evaluation, kind) in tiny().error


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "hidden"])
def test_folders_without_images(tiny: Tiny, tmp_path: Path, use: str, kind: str) -> None:
    folder = tmp_path / "given"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
        (folder / (".hidden.png" if kind == "hidden" else "notes.txt")).write_text("")
    error = tiny(f"--{use}", folder).error
    assert str(folder) in error
    assert "expected images" in error


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("000.png,4", "has the class index 4, but the model has 4 classes, 0 to 3"),
        ("000.png,-1", "the index '-1' is no class index"),
        ("000.png,red", "the index 'red' is no class index"),
        ("absent.png,1", "absent.png does not exist"),
        ("../calibration/000.png,1", "lies outside the folder"),
    ],
)
def test_labels_that_are_wrong(tiny: Tiny, images: Any, row: str, words: str) -> None:
    (images.evaluation / "labels.csv").write_text(f"file,index\n001.png,0\n{row}\n")
    error = tiny().error
    assert words in error
    assert "labels.csv, line 3" in error


def test_the_same_image_in_both_folders(tiny: Tiny, images: Any) -> None:
    shutil.copy(images.calibration / "011.png", images.evaluation / "000.png")
    error = tiny().error
    assert "evaluation/000.png (the same as " in error
    assert "calibration/011.png)" in error
    assert "--allow-overlap" in error
    assert succeeded(tiny("--allow-overlap"))


def test_one_image_is_little_but_enough(tiny: Tiny, images: Any) -> None:
    for folder in (images.calibration, images.evaluation):
        for path in sorted(folder.glob("*.png"))[1:]:
            path.unlink()
    (images.evaluation / "labels.csv").write_text("file,index\n000.png,0\n")
    assert tiny().code == 4


# The build folder


@pytest.mark.parametrize("file", ARTEFACTS)
def test_a_corrupted_artefact_is_made_again(tiny: Tiny, build_dir: Path, file: str) -> None:
    path = build_dir / "tiny" / file
    before = content_of(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    done = tiny("--json")
    assert done.code == 0, done.err
    made = {stage["name"]: stage["changed"] for stage in done.document["stages"] if not stage["cached"]}
    assert made == {ARTEFACTS[file]: [file]}
    assert f"changed: {file}" in done.err
    if not file.endswith(".key.json"):
        assert content_of(path) == before, "the same content came out"


@pytest.mark.parametrize("file", ["folded.onnx", "engines/onnxruntime-int8.json", "logits/reference.npy"])
@pytest.mark.parametrize("truncated", [True, False])
def test_a_truncated_or_deleted_artefact_is_made_again(tiny: Tiny, build_dir: Path, file: str, truncated: bool) -> None:
    path = build_dir / "tiny" / file
    before, content = content_of(path), path.read_bytes()
    path.unlink()
    if truncated:
        path.write_bytes(content[:-9])
    assert tiny().code == 0
    assert content_of(path) == before


def test_results_after_corruption_are_those_before(tiny: Tiny, build_dir: Path) -> None:
    before = tiny("--json").document
    for file in ARTEFACTS:
        (build_dir / "tiny" / file).write_bytes(b"\0" * 40)
    after = tiny("--json").document
    assert not any(stage["cached"] for stage in after["stages"])
    parities = [[engine["parity"] for engine in document["engines"]] for document in (before, after)]
    assert parities[0] == parities[1]
    assert before["reference"] == after["reference"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"recommended": 1}', b"\xff\x00", b'{"recommended": {}}'])
def test_a_corrupted_report(tiny: Tiny, command: Command, build_dir: Path, images: Any, content: bytes) -> None:
    report = build_dir / "tiny" / "report.json"
    report.write_bytes(content)
    done = command("run", images.evaluation / "000.png", "--engine", build_dir / "tiny")
    assert done.code in (0, 1)
    assert "Traceback" not in done.err
    assert tiny().code == 0
    assert json.loads(report.read_text())["verdict"] == "pass"


@pytest.mark.parametrize("name", ["tiny", ""])
def test_a_file_where_the_build_folder_should_be(tiny: Tiny, build_dir: Path, name: str) -> None:
    shutil.rmtree(build_dir)
    (build_dir / name).parent.mkdir(exist_ok=True)
    (build_dir / name).write_text("in the way")
    error = tiny().error
    assert "cannot be written" in error
    assert "--build-dir" in error


@pytest.mark.parametrize("file", ["model.onnx", "export.key.json", "report.json", "logits/reference.npy"])
def test_a_folder_where_a_file_should_be(tiny: Tiny, build_dir: Path, file: str) -> None:
    path = build_dir / "tiny" / file
    path.unlink(missing_ok=True)
    (path / "kept").mkdir(parents=True)
    assert file.rpartition("/")[2] in tiny().error
    assert (path / "kept").exists(), "it is somebody's, not ours to delete"
    shutil.rmtree(path)
    assert tiny().code == 0


@pytest.fixture
def small_disk(build_dir: Path, mounted: Callable[[Path, int], None]) -> Path:
    """The build folder on a disk of its own that has room for what was made, and little more."""
    kept = build_dir.with_name("kept")
    build_dir.rename(kept)
    build_dir.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in kept.rglob("*"))
    mounted(build_dir, used + 64)
    shutil.copytree(kept, build_dir, dirs_exist_ok=True)
    return build_dir


@pytest.fixture
def mounted() -> Iterator[Callable[[Path, int], None]]:
    folders: list[Path] = []

    def mount(folder: Path, kibibytes: int) -> None:
        order = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "edgewright-test", str(folder)]
        if subprocess.run(order, capture_output=True).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(handle, b"\0" * 4096)
    os.close(handle)


def test_a_full_disk(tiny: Tiny, small_disk: Path) -> None:
    calibration = small_disk / "tiny" / "calibration.json"
    calibration.write_bytes(b"\0")  # its new content needs a hundred pages
    fill(small_disk / "filler")
    done = tiny()
    assert "no space left to write" in done.error
    assert "free some space and run again; what is finished is kept" in done.error
    assert not list(small_disk.rglob(".partial-*"))
    (small_disk / "filler").unlink()
    assert tiny().code == 0


def test_a_read_only_disk(tiny: Tiny, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in tiny().error
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert tiny().code == 0


def test_a_disk_that_becomes_full(tiny: Tiny, build_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no disk can be mounted: the same error from the function that syncs."""
    original = Workspace.stage

    def filling(self: Workspace, name: str, *arguments: Any) -> Any:
        if name == "calibrate":
            monkeypatch.setattr("os.fsync", full)
        return original(self, name, *arguments)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workspace, "stage", filling)
    (build_dir / "tiny" / "calibration.json").unlink()
    assert "no space left to write" in tiny().error
    monkeypatch.undo()
    assert not list(build_dir.rglob(".partial-*"))
