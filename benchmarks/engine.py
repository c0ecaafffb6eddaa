"""`edgewright engine mobilenet_effnet_b0` from an empty build folder, and again when nothing has changed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

from figures import Figure, python_seconds

CALL = "import sys; from edgewright.cli import main; sys.argv = ['edgewright', *sys.argv[1:]]; main()"


def measure() -> Iterator[Figure]:
    """Wall seconds of the whole command, twice."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CALL, "engine", "mobilenet_effnet_b0", "--build-dir", folder]
        for name, bound in (("engine, first time", 90.0), ("engine, nothing changed", 5.0)):
            seconds, code = python_seconds(command)
            if code != 0:
                raise RuntimeError(f"{name} ended with exit code {code}")
            yield Figure(name, seconds, "s", bound=bound)
