"""Seconds that `import edgewright.runtime` adds to `import numpy`, in fresh interpreters that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from figures import Figure, run_python

ROUNDS = 9
CODE = """
import time
began = time.perf_counter()
import numpy
middle = time.perf_counter()
import edgewright.runtime
print(time.perf_counter() - middle)
import sys
assert not {"torch", "onnx"} & sys.modules.keys()
"""


def measure() -> Iterator[Figure]:
    """The median."""
    seconds = [float(run_python(CODE)) for _ in range(ROUNDS)]
    yield Figure("import edgewright.runtime, beyond numpy", statistics.median(seconds), "s", bound=0.25)
