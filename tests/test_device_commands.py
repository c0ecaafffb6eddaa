"""`edgewright build`, `verify` and `run` on a bundle, and `doctor`: documents, tables, exit codes, options."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command import Command
from contract import ERROR_DOCUMENT, differences
from edgewright.runtime import cuda
from edgewright.runtime.backends import Absence
from edgewright.runtime.bundle import write_archive, write_key_pair
from edgewright.runtime.errors import BuildError
from fake_gpu import ORIN, FakeGpu
from toy_bundle import toy_bundle, toy_files

Documents = dict[str, Any]


def engines(document: Documents) -> dict[str, str]:
    return {f"{row['backend']} {row['precision']['requested']}": row["status"] for row in document["engines"]}


def test_build_verify_and_run(command: Command, bundle: Path, device_cache: Path, tmp_path: Path) -> None:
    """As a person does it, with processes of their own."""
    built = command("build", bundle, "--cache", device_cache, "--backend", "onnxruntime", "--json")
    assert built.code == 0, built
    assert built.document["schema"] == "edgewright.device-build/1"
    (row,) = built.document["engines"]
    assert (row["status"], row["reason_code"], row["reused"]) == ("verified", "pass", False)
    assert row["precision"] == {"requested": "fp32", "actual": {"fp32": 2}}
    assert Path(row["path"]).stat().st_size == row["bytes"]
    assert row["self_test"]["images"] == 64
    assert built.document["cache"] == str(device_cache)
    assert [line.partition(":")[0] for line in built.err.splitlines()] == ["onnxruntime fp32"] * 3

    verified = command("verify", bundle, "--cache", device_cache, "--json")
    assert (verified.code, verified.document["schema"]) == (0, "edgewright.device-verify/1")
    assert engines(verified.document) == {"onnxruntime fp32": "verified"}

    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    ran = command("run", tmp_path / "grey.png", "--engine", bundle, "--cache", device_cache, "--json")
    assert ran.code == 0, ran
    assert "proven here" in ran.err
    assert {top["label"] for top in ran.document["images"][0]["top"]} == {"ant", "bee", "cat", "dog"}


def test_names_that_are_no_text(command: Command, bundle: Path, tmp_path: Path) -> None:
    """As Linux allows them; they are shown as far as that goes."""
    archive = tmp_path / "b\udcff.edgewright"
    write_archive(bundle, archive)
    done = command("unpack", archive)
    assert (done.code, done.out.splitlines()[0].partition(":")[0]) == (0, f"{tmp_path}/b\\udcff.bundle")
    assert command("unpack", archive).error.startswith(f"{tmp_path}/b?.bundle exists")
    (tmp_path / "b\udcff.bundle" / "\udcfe").write_bytes(b"")
    assert command("build", tmp_path / "b\udcff.bundle", "--cache", tmp_path / "c").error.startswith("? is not in")


def test_the_table_fits_a_terminal(command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    done = command("build", bundle, "--cache", device_cache)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("toy, bundle ")
    assert [line.split()[:3] for line in lines[3:7]] == [
        ["onnxruntime", "fp32", "verified"],
        *(["tensorrt", precision, "verified"] for precision in ("fp32", "fp16", "int8")),
    ]
    again = command("build", bundle, "--cache", device_cache)
    assert again.out == done.out, "kept engines show the same figures"


def test_what_is_missing_stands_below_the_table(
    command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu
) -> None:
    gpu.missing = Absence(
        "package_missing", "the package tensorrt is not installed", "on a Jetson it comes with JetPack"
    )
    done = command("build", bundle, "--cache", device_cache)
    assert done.code == 0, "what was not asked for by name may be missing"
    assert max(map(len, done.out.splitlines())) <= 80
    reason = " ".join(done.out.split("\n\n")[-1].split())
    assert reason == (
        "tensorrt fp32, tensorrt fp16, tensorrt int8: the package tensorrt is not installed; on a Jetson it comes "
        "with JetPack"
    )
    asked = command("build", bundle, "--cache", device_cache, "--backend", "tensorrt", "--json")
    assert (asked.code, set(engines(asked.document).values())) == (3, {"skipped"})
    both = command("build", bundle, "--cache", device_cache, "--backend", "tensorrt", "--backend", "onnxruntime")
    assert both.code == 3


def test_a_failed_self_test(command: Command, tmp_path: Path, device_cache: Path, gpu: FakeGpu) -> None:
    logits = -np.frombuffer(toy_files()["golden/logits.f32"], "<f4")
    bundle = toy_bundle(
        tmp_path / "wrong.bundle",
        files={"golden/logits.f32": logits.tobytes()},
    )
    done = command("build", bundle, "--cache", device_cache, "--precision", "fp32", "--json")
    assert (done.code, set(engines(done.document).values())) == (3, {"over_budget"})
    row = done.document["engines"][0]
    assert (row["path"], row["reason_code"], row["self_test"]["passed"]) == (None, "self_test_failed", False)


def test_a_failed_build(command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    def refuses(request: Any) -> Any:
        raise BuildError("TensorRT built no engine", "raise the limit")

    gpu.compile = refuses  # type: ignore[method-assign]
    done = command("build", bundle, "--cache", device_cache, "--precision", "fp32", "--json")
    assert done.code == 1
    assert engines(done.document) == {"onnxruntime fp32": "verified", "tensorrt fp32": "failed"}
    assert done.document["engines"][1]["reason"] == "TensorRT built no engine; raise the limit"


def test_nothing_to_verify(command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    done = command("verify", bundle, "--cache", device_cache, "--json")
    assert (done.code, done.document["engines"]) == (3, [])
    assert done.err.endswith(f"edgewright build {bundle}\n")


def test_options_of_a_build_reach_it(command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    arguments = ("--backend", "tensorrt", "--precision", "int8", "--workspace", 64, "--dla", 1, "--cache", device_cache)
    assert command("build", bundle, *arguments).code == 0
    assert [(each.workspace, each.dla, each.precision) for each in gpu.requests] == [(64 << 20, 1, "int8")]
    assert command("build", bundle, *arguments).code == 0
    assert len(gpu.requests) == 1
    assert command("build", bundle, *arguments, "--rebuild").code == 0
    assert len(gpu.requests) == 2


def test_the_cache_of_the_environment(
    command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEWRIGHT_CACHE", str(device_cache))
    done = command("build", bundle, "--precision", "fp32", "--json")
    assert done.document["cache"] == str(device_cache)


@pytest.mark.parametrize("name", ["build", "verify"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("--calibration", "folder"), ("--target", "sm86"), ("--opset", 19), ("--weights", "random"), ("--batch", 1),
     ("--threads", 2), ("--max-drop", 0.5)],
)  # fmt: skip
def test_an_option_that_plays_no_role_for_a_bundle(
    command: Command, bundle: Path, device_cache: Path, name: str, option: str, value: object
) -> None:
    done = command(name, bundle, option, value)
    assert done.code == 2
    assert f"{option} plays no role for a bundle" in done.err


@pytest.mark.parametrize("arguments", [("--workspace", 64), ("--dla", 0)])
def test_an_option_that_plays_no_role_when_a_bundle_is_verified(
    command: Command, bundle: Path, arguments: tuple[object, ...]
) -> None:
    done = command("verify", bundle, *arguments)
    assert done.code == 2
    assert "plays no role when a bundle is verified" in done.err


@pytest.mark.parametrize("name", ["build", "verify"])
@pytest.mark.parametrize("arguments", [("--require-signature", "key"), ("--allow-older",), ("--cache", "folder")])
def test_an_option_of_bundles_on_a_model(command: Command, name: str, arguments: tuple[str, ...]) -> None:
    done = command(name, "tiny", *arguments)
    assert done.code == 2
    assert f"{arguments[0]} is for a bundle, and tiny is none" in done.err


def test_errors_are_one_line_and_one_document(
    command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu, tmp_path: Path
) -> None:
    key = write_key_pair(tmp_path / "key").public
    unsigned = command("build", bundle, "--cache", device_cache, "--require-signature", key)
    assert unsigned.code == 1
    assert "sign" in unsigned.error
    for name in ("build", "verify"):
        missing = command(name, tmp_path / "none.bundle", "--cache", device_cache)
        assert "there is no bundle" in missing.error
    document = command("build", bundle, "--backend", "tensorflow", "--cache", device_cache, "--json")
    assert document.code == 1
    assert list(differences(document.document, ERROR_DOCUMENT)) == []
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged.bundle"))
    (damaged / "graphs" / "int8.onnx").write_bytes(b"planted")
    for arguments in (("build", damaged), ("verify", damaged), ("run", "x.png", "--engine", damaged)):
        assert "graphs/int8.onnx" in command(*arguments, "--cache", device_cache).error
    assert gpu.requests == []


def test_doctor(command: Command, device_cache: Path) -> None:
    done = command("doctor", "--cache", device_cache)
    assert done.code == 0
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    words = {line.split()[0]: line.split()[1:] for line in lines if line and not line.startswith(" ")}
    assert words["onnxruntime"][0] == "ready,"
    assert not device_cache.exists()
    document = command("doctor", "--cache", device_cache, "--json").document
    assert document["schema"] == "edgewright.doctor/1"
    assert {"backend", "ready", "version", "reason_code", "reason", "remedy"} <= document["backends"][0].keys()


def test_doctor_on_a_jetson(command: Command, device_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.runtime.device import doctor
    from edgewright.runtime.device.probes import Jetson

    monkeypatch.setattr(cuda, "device_here", lambda: ORIN)
    monkeypatch.setattr(doctor, "jetson", lambda root: Jetson("NVIDIA Jetson Orin", "36.4.3", "", "MAXN"))
    out = command("doctor", "--cache", device_cache).out
    assert "GPU             Orin, sm87, 8.6 GB shared with the processor, driver for CUDA" in out
    assert "L4T             36.4.3" in out
    assert "JetPack         the package nvidia-jetpack is not installed" in out
    assert "power mode      MAXN" in out
