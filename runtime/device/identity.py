"""What an engine is bound to: it is used where all of this is as it was when the engine was built and proven."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends.base import Backend
from ..files import sha256_of
from ..specs import BatchProfile

__all__ = ["GPU_DIALECTS", "BuildSettings", "Place", "cache_key", "key_prefix", "place_here", "processor"]

CPUINFO = Path("/proc/cpuinfo")
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
KEY_DIGITS = 16  # hexadecimal; a clash is noticed, since what the key stands for is kept with it and compared
GPU_DIALECTS = ("tensorrt", "rtx")
FLAGS = frozenset(
    {"avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "f16c", "fma"}
    | {"asimddp", "asimdhp", "bf16", "fphp", "i8mm", "sve", "sve2"}
)
"""Instructions that onnxruntime's kernels are chosen by, on x86 and on Arm."""


@dataclass(frozen=True)
class Place:
    """A backend on a device.

    * version: of the backend's library
    * device: name of the GPU, or model of the processor; architecture: "sm87", or "x86_64"
    * driver: the CUDA version that the GPU's driver supports, and its own version: "12.6, 540.4.0"; "" for a processor
    * features: instructions of a processor that matter, "" for a GPU
    """

    backend: str
    version: str
    device: str
    architecture: str
    driver: str
    features: str


@dataclass(frozen=True)
class BuildSettings:
    """What an engine was asked to be; all None for a processor, where none of it plays a role.

    * workspace: the most scratch memory of a layer, in bytes, None for the default
    * dla: the DLA core of a Jetson, None for the GPU
    """

    profile: BatchProfile | None = None
    workspace: int | None = None
    dla: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BuildSettings:
        """The inverse of `dataclasses.asdict`."""
        profile = content["profile"]
        return cls(None if profile is None else BatchProfile(**profile), content["workspace"], content["dla"])


def place_here(backend: Backend) -> Place:
    """The backend on this device. Raises `DeviceError` if it needs a GPU and there is none."""
    if backend.dialect in GPU_DIALECTS:
        from ..cuda import device_here

        gpu = device_here()
        return Place(backend.name, backend.version(), gpu.name, gpu.architecture, driver_version(gpu.driver), "")
    model, features = processor()
    return Place(backend.name, backend.version(), model, platform.machine(), "", features)


def driver_version(cuda: str, module: Path = KERNEL_MODULE) -> str:
    """The CUDA version `cuda` that a driver supports, with the version of its kernel module if Linux says it."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", module.read_text())
    except OSError:
        return cuda
    return cuda if found is None else f"{cuda}, {found[0]}"


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, str]:
    """Model and instructions that matter, such as ("Cortex-A78AE", "asimddp fphp"), as far as Linux says them.

    Arm gives a part number and no name; then the board's name stands for the model.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.processor() or platform.machine(), ""
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())
    }
    part = f"Arm {fields.get('cpu implementer', '')} {fields.get('cpu part', '')}"
    model = fields.get("model name") or (part if "cpu part" in fields else platform.machine())
    present = FLAGS & set(re.split(r"\s+", fields.get("flags", "") or fields.get("features", "")))
    return model, " ".join(sorted(present))


def cache_key(bundle: str, place: Place, settings: BuildSettings) -> str:
    """Name of the folder for engines of the bundle of that hash; begins with `key_prefix`."""
    named = json.dumps([bundle, asdict(place), asdict(settings)], sort_keys=True)
    return key_prefix(bundle) + sha256_of(named.encode())[:KEY_DIGITS]


def key_prefix(bundle: str) -> str:
    """What the keys of a bundle's engines have in common."""
    return f"{bundle[:KEY_DIGITS]}-"
