"""What a code of CUDA's driver means: no memory, a device that is lost, or a call that failed.

Source: the list of `CUresult` in the CUDA Driver API, 13.0, "Data types used by CUDA driver".
"""

from __future__ import annotations

from ..errors import DeviceError, DeviceLostError, DeviceMemoryError

__all__ = ["LOST", "OUT_OF_MEMORY", "failure"]

OUT_OF_MEMORY = 2
LOST = frozenset(
    {
        214,  # ECC_UNCORRECTABLE
        220,  # NVLINK_UNCORRECTABLE
        226,  # CONTAINED; from here on the documentation says: "the process must be terminated and relaunched"
        700,  # ILLEGAL_ADDRESS
        702,  # LAUNCH_TIMEOUT
        710,  # ASSERT
        714,  # HARDWARE_STACK_ERROR
        715,  # ILLEGAL_INSTRUCTION
        716,  # MISALIGNED_ADDRESS
        717,  # INVALID_ADDRESS_SPACE
        718,  # INVALID_PC
        719,  # LAUNCH_FAILED
        721,  # TENSOR_MEMORY_LEAK
        810,  # MPS_CLIENT_TERMINATED
        911,  # EXTERNAL_DEVICE
        999,  # UNKNOWN: nothing is known of the device's state
    }
)
"""Codes after which every further call of the process fails, whatever it does."""


def failure(call: str, code: int, text: str) -> DeviceError:
    """The error for `call` ("cuMemAlloc") that returned `code`; `text` is what the driver says of the code."""
    message = f"{call} failed: {text}"
    if code == OUT_OF_MEMORY:
        return DeviceMemoryError(
            message,
            "take a smaller batch or profile, close other programs that use the GPU, on a Jetson the desktop too",
        )
    if code in LOST:
        return DeviceLostError(
            message, "the context on the device is gone: close the session, start a new process, and see dmesg"
        )
    return DeviceError(message, "look at nvidia-smi, or on a Jetson at tegrastats")
