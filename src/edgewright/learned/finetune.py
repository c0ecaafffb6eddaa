"""Quantization-aware fine-tuning: the last rung, which trains the weights for the integers that they will become.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference": the
network is trained with its quantization simulated. Here it is the very Q/DQ graph that is measured, as PyTorch runs it:

    x ── QuantizeLinear ── DequantizeLinear ── Conv ── …       the scales stay those of the calibration
    W ── QuantizeLinear ── DequantizeLinear ──┘                W is trained, and its scales follow it

Gradients pass straight through the rounding. Batch normalization is folded already, so that nothing in it can drift.
The FP32 network is the teacher: the loss is the cross entropy of its probabilities (Hinton et al. 2015, "Distilling the
Knowledge in a Neural Network"), and of the labels where there are any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from edgewright.learned.fake_quantization import fake_quantized
from edgewright.learned.graph_module import GraphModule
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.plan import COMPUTE_OPERATORS, NOTHING_LEFT_OUT
from edgewright.optimize.repairs import Repairs
from edgewright.runtime.errors import DataError

__all__ = ["FinetuneSettings", "LabelledBatch", "finetuned"]

LabelledBatch = tuple[NDArray[np.float32], "NDArray[np.int64] | None"]
"""Images `[N, C, H, W]`, preprocessed, and the indices of their classes `[N]` where they are known."""


@dataclass(frozen=True)
class FinetuneSettings:
    """A short training.

    * steps: batches in all, as many passes over the images as that takes
    * learning_rate: of Adam at the start; it falls to 0 along half a cosine
    * label_share: of the loss, that the labels decide; the teacher decides the rest
    * temperature: that the teacher's and the student's logits are divided by
    * device: "cpu" or "cuda"
    """

    steps: int = 500
    learning_rate: float = 1e-4
    label_share: float = 0.25
    temperature: float = 1.0
    device: str = "cpu"


USUAL = FinetuneSettings()


def finetuned(
    reference: ir.Model,
    quantizer: Quantizer,
    batches: Callable[[int], Iterator[LabelledBatch]],
    *,
    settings: FinetuneSettings = USUAL,
    left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> ir.Model:
    """The folded FP32 graph of `quantizer` with trained weights and biases: quantize it as `quantizer` did.

    That is, with the same table, method and remainder, so with the same ranges; without repairs, which the training
    takes the place of.

    * reference: the FP32 teacher, of the same input
    * batches: gives the training images of pass 0, 1, …, in an order of its own each time
    * left_out: layers that stay float
    * progress: told the steps done so far, how many there are, and the last loss

    The same weights come out for the same batches, device and number of threads. Raises `QuantizationError` if PyTorch
    cannot run an operator of the graph, `DataError` without images, or if the loss stops being finite.
    """
    device = torch.device(settings.device)
    graph, weights = fake_quantized(quantizer.repaired(Repairs()).runnable(left_out), quantizer.model)
    names = _trained_names(quantizer.model)
    student = GraphModule(graph, names).to(device)
    teacher = GraphModule(reference).to(device)
    optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate)
    schedule = CosineAnnealingLR(optimizer, settings.steps)
    for step, (images, labels) in enumerate(itertools.islice(_endless(batches), settings.steps), 1):
        x = torch.from_numpy(images).to(device)
        with torch.no_grad():
            expected = teacher(x)
        loss = _loss(student(x), expected, labels, settings)
        if not math.isfinite(loss.item()):
            raise DataError(f"the loss became {loss.item()} in step {step}", "lower the learning rate")
        _update(optimizer, list(student.parameters()), loss)
        schedule.step()
        for weight in weights:
            weight.rescale(student)
        progress(step, settings.steps, loss.item())
    return _with_constants(quantizer.model, {name: student.constant(name) for name in names})


def _trained_names(model: ir.Model) -> tuple[str, ...]:
    """The weights and biases of all convolutions and matrix products, of those that stay float too."""
    values = (value for node in model.graph if node.op_type in COMPUTE_OPERATORS for value in node.inputs[1:3])
    initializers = (value for value in values if value is not None and value.is_initializer())
    constants = (value for value in initializers if constant_tensor(value) is not None)
    return tuple(dict.fromkeys(str(value.name) for value in constants))


def _endless(batches: Callable[[int], Iterator[LabelledBatch]]) -> Iterator[LabelledBatch]:
    """Pass after pass. Raises `DataError` if one has no images."""
    for number in itertools.count():
        empty = True
        for batch in batches(number):
            empty = False
            yield batch
        if empty:
            raise DataError("there are no training images", "name a folder that holds some, or a smaller batch")


def _loss(logits: Tensor, expected: Tensor, labels: NDArray[np.int64] | None, settings: FinetuneSettings) -> Tensor:
    """Cross entropy with the teacher's probabilities and, where there are labels, with these."""
    t = settings.temperature
    distillation = nn.functional.cross_entropy(logits / t, (expected / t).softmax(-1)) * t * t
    if labels is None:
        return distillation
    known = nn.functional.cross_entropy(logits, torch.from_numpy(labels).to(logits.device))
    return (1 - settings.label_share) * distillation + settings.label_share * known


def _update(optimizer: torch.optim.Optimizer, parameters: list[Tensor], loss: Tensor) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def _with_constants(model: ir.Model, tensors: Mapping[str, Tensor]) -> ir.Model:
    """A copy of `model` with other initializers under the same names."""
    changed = model.clone()
    for name, tensor in tensors.items():
        array = tensor.detach().cpu().numpy()
        changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return changed
