"""How fast the machine is set to run just now: clocks, governor, power mode, load. Nothing here ever raises.

Each figure is read below a root that is / but in tests. What cannot be read is None, and `unread` says why.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from .probes import ROOT, jetson

__all__ = ["Clocks", "clocks_here"]

T = TypeVar("T")
CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq/"
BOOST, NO_TURBO = "sys/devices/system/cpu/cpufreq/boost", "sys/devices/system/cpu/intel_pstate/no_turbo"
DEVFREQ = "sys/class/devfreq"
GPU_NAMES = ("gpu", "ga10b", "gv11b", "gp10b", "gb10b")  # how Linux for Tegra ends the name of a Jetson's GPU there
NVIDIA_SMI = "nvidia-smi"
NVIDIA_SMI_SECONDS = 5
NVIDIA_SMI_ARGUMENTS = ("--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0")


class _UnreadError(Exception):
    """Why something cannot be read."""


@dataclass(frozen=True)
class Clocks:
    """What the speed of this machine depends on; frequencies are in MHz.

    * governor: of cpufreq, such as "performance"; several with commas between them
    * cpu_mhz: of the fastest core just now; cpu_max_mhz: the most that any core may reach
    * turbo: whether cores may go beyond their nominal frequency
    * load: runnable processes, the average of the last minute
    * power_mode: of a Jetson, as nvpmodel calls it
    * gpu_mhz: of the GPU just now; gpu_range_mhz: between what it may move, equal after `jetson_clocks`
    * unread: why what is None cannot be read, by name
    """

    governor: str | None
    cpu_mhz: float | None
    cpu_max_mhz: float | None
    turbo: bool | None
    load: float | None
    power_mode: str | None
    gpu_mhz: float | None
    gpu_range_mhz: tuple[float, float] | None
    unread: Mapping[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """What somebody has set, and does not change by itself from one second to the next."""
        names = ("governor", "cpu_max_mhz", "turbo", "power_mode", "gpu_range_mhz")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Clocks:
        """The inverse of `to_json`; fields that a later version added are ignored."""
        known = {name: content[name] for name in cls.__dataclass_fields__}
        limits = known["gpu_range_mhz"]
        return cls(**{**known, "gpu_range_mhz": None if limits is None else tuple(limits)})


def clocks_here(root: Path = ROOT, *, gpu: bool = False) -> Clocks:
    """What can be read now; of a GPU only if `gpu`, since asking for it may take a second."""
    unread: dict[str, str] = {}

    def asked(name: str, probe: Callable[[Path], T]) -> T | None:
        try:
            return probe(root)
        except (_UnreadError, OSError, ValueError, IndexError) as error:
            unread[name] = " ".join(str(error).split()) or type(error).__name__
            return None

    no_gpu = "no engine here runs on a GPU"
    return Clocks(
        governor=asked("governor", _governor),
        cpu_mhz=asked("cpu_mhz", _cpu_mhz),
        cpu_max_mhz=asked("cpu_max_mhz", lambda root: max(_frequencies(root, "cpuinfo_max_freq"))),
        turbo=asked("turbo", _turbo),
        load=asked("load", lambda root: float((root / "proc/loadavg").read_text().split()[0])),
        power_mode=asked("power_mode", _power_mode),
        gpu_mhz=asked("gpu_mhz", _gpu_mhz if gpu else _refused(no_gpu)),
        gpu_range_mhz=asked("gpu_range_mhz", _gpu_range if gpu else _refused(no_gpu)),
        unread=unread,
    )


def _refused(reason: str) -> Callable[[Path], Any]:
    def refuse(root: Path) -> Any:
        raise _UnreadError(reason)

    return refuse


def _governor(root: Path) -> str:
    found = {path.read_text().strip() for path in root.glob(f"{CPUFREQ}scaling_governor")}
    if not found:
        raise _UnreadError("Linux offers no cpufreq here")
    return ",".join(sorted(found))


def _cpu_mhz(root: Path) -> float:
    """As cpufreq says it, else as /proc/cpuinfo does."""
    try:
        return max(_frequencies(root, "scaling_cur_freq"))
    except _UnreadError:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        if not found:
            raise
        return max(found)


def _frequencies(root: Path, name: str) -> list[float]:
    """Of each core, in MHz; Linux has them in kHz."""
    found = [int(path.read_text()) / 1e3 for path in root.glob(CPUFREQ + name)]
    if not found:
        raise _UnreadError("Linux offers no cpufreq here")
    return found


def _turbo(root: Path) -> bool:
    if (root / NO_TURBO).exists():
        return (root / NO_TURBO).read_text().strip() == "0"
    if (root / BOOST).exists():
        return (root / BOOST).read_text().strip() == "1"
    raise _UnreadError("Linux says nothing of it here")


def _power_mode(root: Path) -> str:
    board = jetson(root)
    if board is None:
        raise _UnreadError("this is no Jetson")
    if not board.power_mode:
        raise _UnreadError("nvpmodel does not say it")
    return board.power_mode


def _gpu_mhz(root: Path) -> float:
    """Of a Jetson from devfreq, of another machine from nvidia-smi."""
    folder = _devfreq(root)
    return float(_nvidia_smi()) if folder is None else int((folder / "cur_freq").read_text()) / 1e6


def _gpu_range(root: Path) -> tuple[float, float]:
    folder = _devfreq(root)
    if folder is None:
        raise _UnreadError("only a Jetson says it")
    lowest, highest = (int((folder / name).read_text()) / 1e6 for name in ("min_freq", "max_freq"))
    return lowest, highest


def _devfreq(root: Path) -> Path | None:
    """The folder of a Jetson's GPU, such as 17000000.gpu; it has its frequencies in Hz."""
    return next((path for path in sorted(root.glob(f"{DEVFREQ}/*")) if path.name.endswith(GPU_NAMES)), None)


def _nvidia_smi() -> str:
    program = shutil.which(NVIDIA_SMI)
    if program is None:
        raise _UnreadError(f"{NVIDIA_SMI} is not installed")
    try:
        done = subprocess.run(
            [program, *NVIDIA_SMI_ARGUMENTS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
        )
    except subprocess.SubprocessError as error:
        raise _UnreadError(f"{NVIDIA_SMI} did not answer") from error
    return done.stdout.strip()
