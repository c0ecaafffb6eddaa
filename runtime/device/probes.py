"""What can be read off a device: each function looks at one thing, below a root that is / but in tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Jetson", "jetson"]

ROOT = Path("/")
NVPMODEL = "nvpmodel"
NVPMODEL_SECONDS = 3
# "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, …": L4T 36.4.3
RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
POWER_MODE = re.compile(r"Power Mode:\s*(\S.*?)\s*$", re.MULTILINE)
POWER_STATUS = re.compile(r"^pmode:0*(\d+)", re.MULTILINE)
JETPACK = re.compile(r"^Package: nvidia-jetpack$.*?^Version: (\S+)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Jetson:
    """What a Jetson says of itself; "" where it does not.

    * board: its model; l4t: of Linux for Tegra, "36.4.3"; jetpack: version of the package nvidia-jetpack, "6.2+b77"
    * power_mode: name of the mode, "15W", or its number
    """

    board: str
    l4t: str
    jetpack: str
    power_mode: str


def jetson(root: Path = ROOT) -> Jetson | None:
    """None if this is no Jetson: it has neither NVIDIA's release file nor its name in the device tree."""
    board = _text(root / "proc/device-tree/model").strip("\0 \n")
    release = RELEASE.search(_text(root / "etc/nv_tegra_release"))
    if release is None and "jetson" not in board.lower():
        return None
    l4t = f"{release[1]}.{release[2]}" if release is not None else ""
    return Jetson(board, l4t, _jetpack(root), _power_mode(root))


def _jetpack(root: Path) -> str:
    """The version of the package nvidia-jetpack in dpkg's records, "" if it is not installed."""
    for record in _text(root / "var/lib/dpkg/status").split("\n\n"):
        found = JETPACK.search(record)
        if found and "\nStatus: install ok installed\n" in record:
            return found[1]
    return ""


def _power_mode(root: Path) -> str:
    """What nvpmodel says, else its number in the file that it keeps."""
    found = POWER_MODE.search(_nvpmodel())
    if found is None:
        found = POWER_STATUS.search(_text(root / "var/lib/nvpmodel/status"))
    return found[1] if found else ""


def _nvpmodel() -> str:
    program = shutil.which(NVPMODEL)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "-q"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=NVPMODEL_SECONDS
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
