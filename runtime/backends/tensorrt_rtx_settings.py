"""How TensorRT-RTX runs an engine: its kernels are compiled on the device, so what was compiled is kept on disk."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..cache import OWNER_ONLY, cache_folder, checked_cache
from ..errors import WorkspaceError
from ..files import sha256_of, write_bytes

if TYPE_CHECKING:
    from ..cuda.driver import Device

__all__ = ["RtxSettings", "kept_kernels", "kernels_file"]

KERNELS_FOLDER = "rtx-runtime"


def kernels_file(engine: bytes, version: str, device: Device) -> Path:
    """Where the compiled kernels of an engine are kept, per version of TensorRT-RTX and GPU, in `cache_folder`."""
    gpu = "".join(letter if letter.isalnum() else "-" for letter in f"{device.name} {device.architecture}")
    return cache_folder() / KERNELS_FOLDER / f"{sha256_of(engine)}-{version}-{gpu}.bin"


class RtxSettings:
    """An IRuntimeConfig for the contexts of one engine, with what earlier processes compiled for it.

    * config: for `create_execution_context`
    * captures: TensorRT-RTX captures CUDA graphs itself; a graph of ours would keep the kernels that it uses until
      those for the shape are compiled
    """

    def __init__(self, trt: ModuleType, engine: Any, file: Path, kept: bytes) -> None:
        """`kept` is what `kept_kernels` gives for `file`."""
        self._file = file
        self.config = engine.create_runtime_config()
        self.captures = hasattr(self.config, "cuda_graph_strategy")
        if self.captures:
            self.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self.config.create_runtime_cache()
        self._kept = kept
        # False: damaged, or of another version, driver or GPU. The cache stays empty and replaces the file in the end.
        if self._kept and not self._cache.deserialize(self._kept):
            self._kept = b""
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keeps what was compiled; the cache only saves time, so a folder that cannot be written is no error."""
        serialized = self._cache.serialize()
        content = b"" if serialized is None else bytes(serialized)
        if content and content != self._kept:
            with suppress(WorkspaceError):
                for folder in (self._file.parent.parent, self._file.parent):
                    checked_cache(folder, create=True)
                write_bytes(self._file, content, mode=OWNER_ONLY)


def kept_kernels(file: Path) -> bytes:
    """What was compiled before, empty if there is nothing.

    Raises `WorkspaceError` if others may write to its folders: kernels are code.
    """
    for folder in (file.parent.parent, file.parent):
        if folder.is_dir():
            checked_cache(folder)
    try:
        return file.read_bytes()
    except OSError:  # not there yet, or not readable: it is compiled again
        return b""
