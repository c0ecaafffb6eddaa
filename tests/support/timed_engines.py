"""Engines to be measured whose runs take the time that a test gives them, by a clock that only they advance: fakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.bench import Bench, Candidate, SetUp, bench
from edgewright.runtime.specs import TensorSpec
from fake_timing import FakeBackend, Milliseconds

__all__ = ["INPUT", "FakeEngines", "adding_onnx", "identity_onnx"]

INPUT = TensorSpec("x", (None, 32, 8, 8), "float32")


class FakeEngines(FakeBackend):
    """Of one layer each, so that the clock they share moves by what `engine` was given."""

    def __init__(self) -> None:
        super().__init__({})

    def engine(self, name: str, milliseconds: float, *, spec: TensorSpec = INPUT) -> Candidate:
        """An engine for ONNX files, called `name`, that takes so long."""
        self._layers = {**self._layers, name: Milliseconds(milliseconds, milliseconds)}
        return Candidate(f"{name}.onnx", self, json.dumps({name: "fp32"}).encode(), None, "a fake", (spec,))

    def bench(self, *engines: Candidate, batches: tuple[int, ...] = (1,), threads: int = 1, **options: Any) -> Bench:
        """`bench` by the fake clock, a tenth of a second for each engine in each set-up."""
        setups = [SetUp(batch, threads) for batch in batches]
        return bench(engines, setups, clock=self.clock, **{"seconds": 0.1, **options})


def adding_onnx(path: Path, values: NDArray[np.float32]) -> Path:
    """An ONNX file that adds `values`, float32 `[3, 4, 4]`, to its input; they stand in weights.bin beside it."""
    import onnx

    text = """<ir_version: 10, opset_import: ["": 19]> agraph (float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y)
        { y = Add (x, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def identity_onnx(path: Path, *, sides: str = "N, 3, 4, 4", kind: str = "float") -> Path:
    """An ONNX file that gives back its input."""
    import onnx

    text = f"""<ir_version: 10, opset_import: ["": 19]> agraph ({kind}[{sides}] x) => ({kind}[{sides}] y)
        {{ y = Identity (x) }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path
