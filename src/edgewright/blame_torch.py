"""The activations of a PyTorch module under the names that they have in its exported graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.optimize.layer_errors import Activations
from edgewright.optimize.stages import module_of

__all__ = ["TorchActivations"]

Batch = NDArray[np.float32]


class TorchActivations:
    """What the submodules of `module` give, beside the tensors of `exported` that hold the same.

    The exporter names nodes after modules, and the last node of a module gives what the module gives. A module that is
    called more than once, or gives another shape than its last node, is left out. `tensors` are the names of the rest.
    """

    def __init__(self, module: nn.Module, exported: ir.Model, image: Batch) -> None:
        self._module = module
        calls: Counter[str] = Counter()
        shapes: dict[str, tuple[int, ...]] = {}

        def look(name: str, output: torch.Tensor) -> None:
            calls[name] += 1
            shapes[name] = tuple(output.shape[1:])

        with self._watched([name for name, _ in module.named_modules() if name], look):
            self._run(image[:1])
        self._modules = {
            str(value.name): name
            for name, value in _results(exported).items()
            if calls[name] == 1 and value.shape is not None and tuple(value.shape[1:]) == shapes[name]
        }
        self.tensors = tuple(self._modules)

    def __call__(self, names: Sequence[str]) -> Activations:
        """The function of images that gives the tensors `names`."""
        tensors = {self._modules[name]: name for name in names}

        def activations(images: Batch) -> Mapping[str, NDArray[Any]]:
            found: dict[str, NDArray[Any]] = {}

            def keep(name: str, output: torch.Tensor) -> None:
                found[tensors[name]] = output.numpy().copy()  # the next module may work in place

            with self._watched(tensors, keep):
                self._run(images)
            return found

        return activations

    def _run(self, images: Batch) -> None:
        with torch.inference_mode(), redirect_stdout(sys.stderr):  # stdout belongs to the results
            self._module(torch.from_numpy(images))

    @contextmanager
    def _watched(self, names: Any, tell: Any) -> Iterator[None]:
        """Calls `tell(name, output)` for each tensor that a module of `names` gives."""

        def hook_of(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    tell(name, output)

            return hook

        modules = dict(self._module.named_modules())
        handles = [modules[name].register_forward_hook(hook_of(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _results(exported: ir.Model) -> dict[str, ir.Value]:
    """What the last node of each module gives, by the names of the modules."""
    last: dict[str, ir.Value] = {}
    for node in exported.graph:
        parts = module_of(str(node.name)).split(".")
        for length in range(1, len(parts) + 1):
            last[".".join(parts[:length])] = node.outputs[0]
    return last
