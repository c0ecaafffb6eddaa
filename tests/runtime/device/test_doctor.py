"""What the doctor finds: on faked devices, with faked packages, and on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from importlib import metadata
from pathlib import Path

import pytest

from edgewright.runtime import backends, cuda
from edgewright.runtime.cuda.driver import Device
from edgewright.runtime.device import doctor, probes
from edgewright.runtime.device.doctor import examination
from edgewright.runtime.device.memory import Memory
from edgewright.runtime.device.probes import Jetson, jetson
from edgewright.runtime.errors import DeviceError
from edgewright.runtime.installed import installed_version, two_onnxruntimes

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n"
DPKG = """Package: libc6
Status: install ok installed
Version: 2.35

Package: nvidia-jetpack
Status: {status}
Priority: standard
Maintainer: NVIDIA Corporation
Architecture: arm64
Version: 6.2+b77
Depends: nvidia-jetpack-runtime (= 6.2+b77)

Package: nvidia-jetpack-dev
Status: install ok installed
Version: 9.9
"""


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """The root of a Jetson, as far as it is looked at."""
    files = {
        "etc/nv_tegra_release": RELEASE,
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/meminfo": "MemTotal:        7802000 kB\nMemAvailable:    5000000 kB\n",
        "proc/cpuinfo": "Features\t: fp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
        "var/lib/dpkg/status": DPKG.format(status="install ok installed"),
        "var/lib/nvpmodel/status": "pmode:0002\n",
    }
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "root"


def put_nvpmodel(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    program = folder / "nvpmodel"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def fake_distributions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_a_jetson(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvpmodel(tmp_path / "bin", '[ "$1" = -q ] && printf "NV Power Mode: MAXN_SUPER\\n2\\n"', monkeypatch)
    assert jetson(orin) == Jetson(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2+b77", "MAXN_SUPER"
    )


@pytest.mark.parametrize("script", ["echo 'NVPM ERROR: no permission' >&2; exit 1", "sleep 30", "printf '\\377\\376'"])
def test_a_power_mode_that_nvpmodel_does_not_say(
    orin: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "NVPMODEL_SECONDS", 0.2)
    put_nvpmodel(tmp_path / "bin", f"exec {script}" if script.startswith("sleep") else script, monkeypatch)
    found = jetson(orin)
    assert found is not None
    assert found.power_mode == "2"


def test_a_jetson_without_records(orin: Path) -> None:
    for name in ("var/lib/dpkg/status", "var/lib/nvpmodel/status", "proc/device-tree/model"):
        (orin / name).unlink()
    assert jetson(orin) == Jetson("", "36.4.3", "", "")
    (orin / "etc/nv_tegra_release").write_text("something else")
    assert jetson(orin) is None


def test_a_jetpack_that_was_removed_is_none(orin: Path) -> None:
    (orin / "var/lib/dpkg/status").write_text(DPKG.format(status="deinstall ok config-files"))
    found = jetson(orin)
    assert found is not None
    assert found.jetpack == ""


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    assert jetson(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert jetson(tmp_path) is None


@pytest.mark.parametrize(
    ("versions", "two"),
    [({"onnxruntime": "1.23", "onnxruntime-gpu": "1.22"}, True), ({"onnxruntime": "1.23"}, False),
     ({"onnxruntime-gpu": "1.22"}, False), ({}, False)],
)  # fmt: skip
def test_two_onnxruntimes(
    versions: dict[str, str], two: bool, orin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_distributions(monkeypatch, **versions)
    assert two_onnxruntimes() == two
    warnings = examination(orin, cache=tmp_path / "none").warnings
    assert [warning.remedy[:44] for warning in warnings] == ["pip uninstall -y onnxruntime onnxruntime-gpu"] * two


def test_versions_are_those_of_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distributions(monkeypatch, **{"tensorrt-cu12": "10.3.0", "cuda-bindings": "12.6.2"})
    assert installed_version("tensorrt", "tensorrt-cu12", "tensorrt-cu13") == "10.3.0"
    assert installed_version("pycuda") is None


def test_what_is_found_on_a_device(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("Orin", "sm87", "12.6", integrated=True, memory=8 << 30)
    monkeypatch.setattr(cuda, "device_here", lambda: gpu)
    found = examination(orin, cache=tmp_path / "none")
    assert found.gpu == {
        "name": "Orin", "architecture": "sm87", "driver": "12.6", "integrated": True, "memory": 8 << 30
    }  # fmt: skip
    assert found.memory == Memory(7802000 * 1024, 5000000 * 1024)
    assert found.processor == "Arm 0x41 0xd42"
    assert found.jetson is not None
    assert json.loads(json.dumps(found.to_json()))["jetson"]["l4t"] == "36.4.3"


@pytest.mark.skipif(Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists(), reason="there is a GPU here")
def test_this_machine_honestly(tmp_path: Path) -> None:
    found = examination(cache=tmp_path / "none")
    assert found.gpu is None
    assert found.gpu_reason
    states = {state.backend: state for state in found.backends}
    assert states.keys() == backends.BACKENDS.keys()
    assert states["onnxruntime"].ready == (importlib.util.find_spec("onnxruntime") is not None)
    assert not states["tensorrt"].ready
    assert states["tensorrt"].remedy
    if importlib.util.find_spec("tensorrt") is None:
        assert states["tensorrt"].reason_code == "package_missing"
    assert found.libraries["numpy"] == metadata.version("numpy")
    assert "CPUExecutionProvider" in found.providers
    assert found.warnings == ()


def test_probes_that_fail_or_hang_are_warnings(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs() -> None:
        time.sleep(3)

    def breaks() -> None:
        raise ValueError("a library\nis broken")

    monkeypatch.setattr(doctor, "_gpu", hangs)
    monkeypatch.setattr(doctor, "_providers", breaks)
    monkeypatch.setattr(doctor, "_state", lambda backend: breaks())
    began = time.monotonic()
    found = examination(orin, cache=tmp_path / "none", seconds=0.2)
    assert time.monotonic() - began < 2
    facts = [warning.fact for warning in found.warnings]
    assert "the GPU could not be asked (no answer within 0.2 s)" in facts
    assert "onnxruntime's providers could not be asked (ValueError: a library is broken)" in facts
    assert {state.reason_code for state in found.backends} == {"unknown"}
    assert (found.gpu, found.providers) == (None, ())


def test_a_cache_that_is_not_safe_is_a_warning(orin: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    (warning,) = examination(orin, cache=tmp_path / "cache").warnings
    assert "can be written by others" in warning.fact


def test_a_gpu_that_refuses_is_explained(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise DeviceError("the driver is too old", "update it")

    monkeypatch.setattr(cuda, "device_here", refused)
    found = examination(orin, cache=tmp_path / "none")
    assert (found.gpu, found.gpu_reason) == (None, "the driver is too old; update it")
    assert found.warnings == ()
