"""The device side: preprocessing, backends, `Session` and parity, with numpy, Pillow and one backend's package.

Imports neither torch nor onnx, and nothing outside this folder.
"""

from .backends.runner import Counters
from .errors import EdgewrightError
from .pool import SessionPool
from .preprocess import Preprocess
from .session import Prediction, Session
from .specs import EngineInfo, TensorSpec

__all__ = [
    "Counters",
    "EdgewrightError",
    "EngineInfo",
    "Prediction",
    "Preprocess",
    "Session",
    "SessionPool",
    "TensorSpec",
]
