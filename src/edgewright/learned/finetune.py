"""Quantization-aware fine-tuning: the last rung, which trains the weights for the integers that they will become.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference": the
network is trained with its quantization simulated. Here it is the very Q/DQ graph that is measured, as PyTorch runs it:

    x ── QuantizeLinear ── DequantizeLinear ── Conv ── …       the scales stay those of the calibration
    W ── QuantizeLinear ── DequantizeLinear ──┘                W is trained, and its scales follow it

Gradients pass straight through the rounding. Batch normalization is folded already, so that nothing in it can drift.

The FP32 network is the teacher. What is learned are its logits (Ba and Caruana 2014, "Do Deep Nets Really Need to be
Deep?"), by the error that the ladder judges by: the power of the noise in the logits over the power of the logits.

The channels of folded weights lie orders of magnitude apart, and Adam moves every number by about as much. So the
weights are trained in units of their quantization steps (cf. You et al. 2017, "Large Batch Training of Convolutional
Networks", for rates in proportion to the weights): a learning rate of 0.02 is a fiftieth of a step. Measured on
mobilenet_effnet_b0 with min-max ranges, by the logit SQNR on 192 to 512 training images that were held back: 60 batches
of 32 gave 16.5 → 21.3 dB in the CPU's dialect; 20 batches of 16 gave 21.5 → 25.9 dB in TensorRT's, 25.1 at a rate of
0.005. Halfway through the 60 batches a rate of 0.02 stood at 20.6 dB, one of 0.1 at 17.7. The usual 200 batches of 64
in TensorRT's dialect gave 21.3 → 27.3 dB on the 10,000 test images, which had no say in any of this: the loss fell from
0.37 to 0.20 points, the agreement rose from 0.986 to 0.991.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from edgewright.learned.fake_quantization import QuantizedWeight, dequantized_weights, fake_quantized
from edgewright.learned.graph_module import GraphModule
from edgewright.learned.numerics import numerics
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.plan import COMPUTE_OPERATORS, NOTHING_LEFT_OUT
from edgewright.optimize.repairs import with_bias_shifts
from edgewright.runtime.errors import DataError, QuantizationError

__all__ = ["FinetuneSettings", "LabelledBatch", "finetuned"]

LabelledBatch = tuple[NDArray[np.float32], "NDArray[np.int64] | None"]
"""Images `[N, C, H, W]`, preprocessed, and the indices of their classes `[N]` where they are known."""
WARMUP = 0.1
"""Of the steps: Adam knows little of the gradients' sizes in its first ones."""
STEPS_OF_FLOAT = 64
"""In the mean magnitude of a bias, or of a weight that stays float, as in an INT8 weight of half the largest. Not a
share of its largest number: where a few are large, the steps of all others would be long.
"""


@dataclass(frozen=True)
class FinetuneSettings:
    """A short training.

    * steps: batches in all, as many passes over the images as that takes
    * learning_rate: of Adam at its highest, in quantization steps; it rises over a tenth of the batches and then falls
      to 0 along half a cosine
    * label_share: of the loss, that the labels decide; the teacher decides the rest
    * device: "cpu" or "cuda"; threads: of the CPU, 0 for as many as PyTorch takes by itself
    """

    steps: int = 200
    learning_rate: float = 0.02
    label_share: float = 0.0
    device: str = "cpu"
    threads: int = 0


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

    That is, with the same table, method and remainder, so with the same ranges; without repairs: the training starts
    from what these gave, the shifted biases and the rounded weights, and they are in the result.

    * reference: the FP32 teacher, of the same input
    * batches: gives the training images of pass 0, 1, …, in an order of its own each time
    * left_out: layers that stay float
    * progress: told the steps done so far, how many there are, and the last loss

    The same weights come out for the same batches, device and number of threads. Raises `QuantizationError` if PyTorch
    cannot run an operator of the graph, or if the loss stops being finite; `DataError` without images.
    """
    start = _repaired(quantizer, left_out)
    names = _trained_names(start)
    graph, weights = fake_quantized(quantizer.for_network(start, quantizer.table).runnable(left_out), start)
    student = GraphModule(graph, names).to(settings.device)
    teacher = GraphModule(reference).to(settings.device)
    _train_in_steps(student, names, weights)
    with numerics(settings.threads):
        _train(student, teacher, weights, batches, settings, progress)
    return _with_constants(start, {name: student.constant(name) for name in names})


def _repaired(quantizer: Quantizer, left_out: Mapping[str, str]) -> ir.Model:
    """A copy of the FP32 graph that has the repairs of its INT8 layers in its own weights and biases."""
    repairs = quantizer.repairs
    layers = set(quantizer.layers) - set(left_out)
    shifts = {layer: shift for layer, shift in repairs.bias_shifts.items() if layer in layers}
    model = with_bias_shifts(quantizer.model, shifts)
    rounded = dequantized_weights(quantizer.runnable(left_out)) if repairs.integers else {}
    for node in model.graph:
        weight = node.inputs[1] if node.name in rounded and node.name in repairs.integers else None
        if weight is not None and weight.is_initializer() and len(weight.uses()) == 1:
            weight.const_value = ir.tensor(rounded[str(node.name)], name=weight.name)
    return model


def _trained_names(model: ir.Model) -> tuple[str, ...]:
    """The weights and biases of all convolutions and matrix products, of those that stay float too."""
    values = (value for node in model.graph if node.op_type in COMPUTE_OPERATORS for value in node.inputs[1:3])
    initializers = (value for value in values if value is not None and value.is_initializer())
    constants = (value for value in initializers if constant_tensor(value) is not None)
    return tuple(dict.fromkeys(str(value.name) for value in constants))


class _InSteps(nn.Module):
    """A tensor as a sum: what it was at the start, and a multiple of its quantization step, which is trained."""

    start: Tensor
    step: Tensor

    def __init__(self, start: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("step", step)

    def forward(self, moved: Tensor) -> Tensor:
        return self.start + self.step * moved

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """At the start nothing has moved."""
        return torch.zeros_like(tensor)


def _train_in_steps(student: GraphModule, names: tuple[str, ...], weights: tuple[QuantizedWeight, ...]) -> None:
    steps = {weight.weight: weight.step(student) for weight in weights}
    for name in names:
        tensor = student.constant(name).detach()
        student.parametrize(name, _InSteps(tensor, steps.get(name, tensor.abs().mean() / STEPS_OF_FLOAT)))


def _train(
    student: GraphModule,
    teacher: GraphModule,
    weights: tuple[QuantizedWeight, ...],
    batches: Callable[[int], Iterator[LabelledBatch]],
    settings: FinetuneSettings,
    progress: Callable[[int, int, float], None],
) -> None:
    parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)
    schedule = LambdaLR(optimizer, partial(_rate, steps=settings.steps))
    for step, (images, labels) in enumerate(itertools.islice(_endless(batches), settings.steps), 1):
        x = torch.from_numpy(images).to(settings.device)
        with torch.no_grad():
            expected = teacher(x)
        loss = _loss(student(x), expected, labels, settings.label_share)
        if not math.isfinite(loss.item()):
            raise QuantizationError(f"the training diverged: the loss became {loss.item()} in step {step}")
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        for weight in weights:
            weight.rescale(student)
        progress(step, settings.steps, loss.item())


def _rate(done: int, steps: int) -> float:
    """The share of the highest learning rate behind `done` of `steps`."""
    rise = min(1.0, (done + 1) / (WARMUP * steps))
    return rise * (1 + math.cos(math.pi * done / steps)) / 2


def _endless(batches: Callable[[int], Iterator[LabelledBatch]]) -> Iterator[LabelledBatch]:
    """Pass after pass. Raises `DataError` if one has no images."""
    for number in itertools.count():
        empty = True
        for batch in batches(number):
            empty = False
            yield batch
        if empty:
            raise DataError("there are no training images", "name a folder that holds some, or a smaller batch")


def _loss(logits: Tensor, expected: Tensor, labels: NDArray[np.int64] | None, label_share: float) -> Tensor:
    """The noise-to-signal ratio of the logits and, where there are labels, their cross entropy."""
    distillation = (logits - expected).square().sum() / expected.square().sum()
    if labels is None or not label_share:
        return distillation
    known = nn.functional.cross_entropy(logits, torch.from_numpy(labels).to(logits.device))
    return (1 - label_share) * distillation + label_share * known


def _with_constants(model: ir.Model, tensors: Mapping[str, Tensor]) -> ir.Model:
    """A copy of `model` with other initializers under the same names."""
    changed = model.clone()
    for name, tensor in tensors.items():
        array = tensor.detach().cpu().numpy()
        changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return changed
