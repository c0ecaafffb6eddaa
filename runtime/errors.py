"""The errors that the library raises, each saying the fact, what was expected and what to do.

EdgewrightError
├── ModelError            a model is unknown, or its weights do not fit
├── ExportError           PyTorch → ONNX failed, or the graph differs from PyTorch
├── DataError             images or labels are missing, broken or contradictory
├── CalibrationError      no usable ranges
├── QuantizationError     a graph that cannot be folded or quantized correctly
├── BuildError            a backend refused to build
├── EngineError           an engine cannot be loaded or run
│   ├── BundleError       a bundle is not what it says
│   │   ├── SignatureError     it is not signed by a key that is trusted here
│   │   └── RollbackError      it is older than one that was used here
│   ├── DeviceError       the device or its driver refused
│   │   ├── DeviceMemoryError  the device has no memory left
│   │   └── DeviceLostError    the device can no longer be used by this process
│   ├── InputError        an input's name, shape, dtype or device does not fit
│   └── ClosedError       something was used after it was closed
├── ParityError           a comparison that has no meaning
└── WorkspaceError        the build folder is locked, full, read-only or corrupted
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "BundleError",
    "CalibrationError",
    "ClosedError",
    "DataError",
    "DeviceError",
    "DeviceLostError",
    "DeviceMemoryError",
    "EdgewrightError",
    "EngineError",
    "ExportError",
    "InputError",
    "ModelError",
    "ParityError",
    "QuantizationError",
    "RollbackError",
    "SignatureError",
    "WorkspaceError",
]


class EdgewrightError(Exception):
    """Base of all errors that the library raises on purpose.

    `message` states the fact and what was expected; `remedy` says what to do about it (may be empty).
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


class ModelError(EdgewrightError):
    """A model is unknown, or its weights do not fit."""


class ExportError(EdgewrightError):
    """PyTorch → ONNX failed, or the graph differs from PyTorch."""


class DataError(EdgewrightError):
    """Images or labels are missing, broken or contradictory."""


class CalibrationError(EdgewrightError):
    """No usable ranges."""


class QuantizationError(EdgewrightError):
    """A graph that cannot be folded or quantized correctly."""


class BuildError(EdgewrightError):
    """A backend refused to build."""


class EngineError(EdgewrightError):
    """An engine cannot be loaded or run."""


class BundleError(EngineError):
    """A bundle is not what it says."""


class SignatureError(BundleError):
    """A bundle is not signed by a key that is trusted here."""


class RollbackError(BundleError):
    """A bundle is older than one that was used here."""


class DeviceError(EngineError):
    """The device or its driver refused."""


class DeviceMemoryError(DeviceError):
    """The device has no memory left."""


class DeviceLostError(DeviceError):
    """The device can no longer be used by this process: what failed took its context with it."""


class InputError(EngineError):
    """An input's name, shape, dtype or device does not fit."""


class ClosedError(EngineError):
    """Something was used after it was closed."""


class ParityError(EdgewrightError):
    """A comparison that has no meaning."""


class WorkspaceError(EdgewrightError):
    """The build folder is locked, full, read-only or corrupted."""
