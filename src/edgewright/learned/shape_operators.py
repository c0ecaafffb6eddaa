"""Operators that move, cut, join and convert tensors, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgewright.learned.operation import Operation, dimensions
from edgewright.optimize.edits import label
from edgewright.runtime.errors import QuantizationError

__all__ = ["SHAPE_OPERATORS"]

PADDING_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


def _identity(node: ir.Node) -> Operation:
    return lambda x, *others: x


def _reshape(node: ir.Node) -> Operation:
    keeps_zeros = node.attributes.get_int("allowzero", 0)

    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        sides = dimensions(shape)
        if not keeps_zeros:
            sides = [side or x.shape[axis] for axis, side in enumerate(sides)]
        return x.reshape(sides)

    return reshape


def _flatten(node: ir.Node) -> Operation:
    axis = node.attributes.get_int("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        before = x.shape[:axis].numel()
        return x.reshape(before, -1)

    return flatten


def _transpose(node: ir.Node) -> Operation:
    order = node.attributes.get_ints("perm", ())
    return lambda x: x.permute(*(order or reversed(range(x.ndim))))


def _concat(node: ir.Node) -> Operation:
    axis = node.attributes.get_int("axis", 0)
    return lambda *parts: torch.cat(parts, axis)


def _slice(node: ir.Node) -> Operation:
    def cut(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        begins = dimensions(starts)
        chosen = dimensions(axes) if axes is not None else list(range(len(begins)))
        strides = dimensions(steps) if steps is not None else [1] * len(begins)
        for axis, begin, end, step in zip(chosen, begins, dimensions(ends), strides, strict=True):
            places = range(*slice(begin, end, step).indices(x.shape[axis]))
            x = x.index_select(axis, torch.tensor(places, device=x.device))
        return x

    return cut


def _split(node: ir.Node) -> Operation:
    axis = node.attributes.get_int("axis", 0)

    def split(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        if sizes is not None:
            return torch.split(x, dimensions(sizes), axis)
        return torch.split(x, -(-x.shape[axis] // len(node.outputs)), axis)

    return split


def _squeeze(node: ir.Node) -> Operation:
    def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(dimensions(axes)))

    return squeeze


def _unsqueeze(node: ir.Node) -> Operation:
    def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(axis % rank for axis in dimensions(axes)):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _pad(node: ir.Node) -> Operation:
    mode = PADDING_MODES.get(node.attributes.get_string("mode", "constant") or "")
    if mode is None:
        raise QuantizationError(f"{label(node)} pads in a mode that cannot be run in PyTorch")

    def pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        numbers = dimensions(pads)
        chosen = [axis % x.ndim for axis in (dimensions(axes) if axes is not None else range(x.ndim))]
        around = [(0, 0)] * x.ndim
        for axis, begin, end in zip(chosen, numbers[: len(chosen)], numbers[len(chosen) :], strict=True):
            around[axis] = (begin, end)
        while mode != "constant" and around[0] == (0, 0) and len(around) > x.ndim - 2:
            around.pop(0)  # PyTorch pads so along the last axes only
        flat = [side for pair in reversed(around) for side in pair]
        if mode == "constant":
            return nn.functional.pad(x, flat, value=0.0 if value is None else float(value))
        return nn.functional.pad(x, flat, mode)

    return pad


def _cast(node: ir.Node) -> Operation:
    target = node.attributes.get_int("to", 0)
    dtype = DTYPES.get(ir.DataType(target))
    if dtype is None:
        raise QuantizationError(f"{label(node)} casts to {ir.DataType(target).name}, which cannot be run in PyTorch")
    return lambda x: x.to(dtype)


def _shape(node: ir.Node) -> Operation:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _gather(node: ir.Node) -> Operation:
    axis = node.attributes.get_int("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        chosen = x.index_select(axis, (indices.reshape(-1) % x.shape[axis]).to(x.device))
        where = axis % x.ndim
        return chosen.reshape(*x.shape[:where], *indices.shape, *x.shape[where + 1 :])

    return gather


SHAPE_OPERATORS: Mapping[str, Callable[[ir.Node], Operation]] = {
    "Identity": _identity,
    "Dropout": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Cast": _cast,
    "Shape": _shape,
    "Gather": _gather,
}
