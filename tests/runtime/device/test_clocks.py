"""Clocks, governors and power modes, read below a made-up root; what is not there is None, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewright.runtime.device import clocks
from edgewright.runtime.device.clocks import Clocks, clocks_here

FILES = {
    "proc/loadavg": "0.52 0.58 0.59 1/257 4242\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1510400\n",
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "1190400\n",
    "sys/devices/system/cpu/cpu10/cpufreq/cpuinfo_max_freq": "1510400\n",
    "sys/devices/system/cpu/cpufreq/boost": "1\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Jetson, as far as it is looked at, without NVIDIA's programs."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, content in FILES.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "root"


def put_program(tmp_path: Path, script: str) -> None:
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_jetson(root: Path) -> None:
    assert clocks_here(root, gpu=True) == Clocks(
        governor="performance,schedutil",
        cpu_mhz=1190.4,
        cpu_max_mhz=1510.4,
        turbo=True,
        load=0.52,
        power_mode="2",
        gpu_mhz=306.0,
        gpu_range_mhz=(306.0, 624.75),
        unread={},
    )


def test_nothing_can_be_read(tmp_path: Path) -> None:
    found = clocks_here(tmp_path)
    values = {name: value for name, value in vars(found).items() if name != "unread"}
    assert set(values.values()) == {None}
    assert found.unread.keys() == values.keys()
    assert all(found.unread.values())
    assert found.unread["power_mode"] == "this is no Jetson"
    assert found.unread["gpu_mhz"] == "no engine here runs on a GPU"


@pytest.mark.parametrize("name", [name for name in FILES if name != "proc/device-tree/model"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"N/A\n"], ids=["empty", "binary", "text"])
def test_broken_files_are_no_error(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    found = clocks_here(root, gpu=True)
    assert all(getattr(found, name) is None for name in found.unread)


def test_the_processors_own_word_where_there_is_no_cpufreq(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2294.6\nprocessor\t: 1\ncpu MHz\t\t: 3000.1\n")
    found = clocks_here(tmp_path)
    assert found.cpu_mhz == 3000.1
    assert found.unread["cpu_max_mhz"] == found.unread["governor"] == "Linux offers no cpufreq here"


@pytest.mark.parametrize(("content", "turbo"), [("0", True), ("1", False)])
def test_intels_turbo_is_told_the_other_way_round(root: Path, content: str, turbo: bool) -> None:
    path = root / clocks.NO_TURBO
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert clocks_here(root).turbo is turbo


def test_a_graphics_card_is_asked_through_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setattr(clocks, "NVIDIA_SMI_SECONDS", 0.2)
    put_program(tmp_path, "echo 1980")
    found = clocks_here(tmp_path, gpu=True)
    assert (found.gpu_mhz, found.unread["gpu_range_mhz"]) == (1980.0, "only a Jetson says it")
    put_program(tmp_path, "echo no devices were found; exit 6")
    assert "no devices were found" in clocks_here(tmp_path, gpu=True).unread["gpu_mhz"]
    put_program(tmp_path, "exec sleep 5")
    assert clocks_here(tmp_path, gpu=True).unread["gpu_mhz"] == "nvidia-smi did not answer"


def test_json_round_trip(root: Path) -> None:
    found = clocks_here(root, gpu=True)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Clocks.from_json({**content, "added_later": 1}) == found


def test_settings_are_what_somebody_has_set(root: Path) -> None:
    assert clocks_here(root, gpu=True).settings == {
        "governor": "performance,schedutil",
        "cpu_max_mhz": 1510.4,
        "turbo": True,
        "power_mode": "2",
        "gpu_range_mhz": (306.0, 624.75),
    }
