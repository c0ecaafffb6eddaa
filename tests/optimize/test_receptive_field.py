"""Receptive fields: by hand, against published ones, and against the gradient of each output in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgewright.optimize.one_image import for_one_image
from edgewright.optimize.receptive_field import Reach, receptive_fields, window_of
from textual_graphs import graph

THREE = """
a = Conv <pads = [1, 1, 1, 1]> (x, w)
b = Conv <pads = [1, 1, 1, 1]> (a, v)
y = Conv <pads = [1, 1, 1, 1]> (b, u)
"""


def reach(model: ir.Model, name: str = "y") -> Reach | None:
    fields = receptive_fields(for_one_image(model, None).graph)
    (found,) = (field for value, field in fields.items() if value.name == name)
    return found


def size(model: ir.Model, name: str = "y") -> tuple[float, ...]:
    found = reach(model, name)
    assert found is not None
    return found.size


def test_three_stacked_3x3_convolutions_see_3_5_7() -> None:
    model = graph(THREE, w=(3, 3, 3, 3), v=(3, 3, 3, 3), u=(3, 3, 3, 3))
    assert [size(model, name) for name in "aby"] == [(3, 3), (5, 5), (7, 7)]


def chain(*layers: tuple[int, int]) -> ir.Model:
    """Poolings, which need no weights, of (kernel, stride)."""
    names = ["x", *(f"t{index}" for index in range(1, len(layers))), "y"]
    body = "\n".join(
        f"{names[index + 1]} = MaxPool <kernel_shape = [{k}, {k}], strides = [{s}, {s}]> ({names[index]})"
        for index, (k, s) in enumerate(layers)
    )
    return graph(body, "float[N, 1, 999, 999] x")


@pytest.mark.parametrize(
    ("layers", "field"),
    [  # Araujo et al. 2019, table of popular networks
        (((11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)), 195),  # AlexNet
        (((3, 1), (3, 1), (2, 2)) * 2 + ((3, 1), (3, 1), (3, 1), (2, 2)) * 3, 212),  # VGG-16
    ],
)
def test_published_receptive_fields(layers: tuple[tuple[int, int], ...], field: int) -> None:
    assert size(chain(*layers)) == (field, field)


LAYERS: dict[str, nn.Module] = {
    "plain": nn.Conv2d(2, 2, 3),
    "strided": nn.Conv2d(2, 2, 3, stride=2),
    "dilated": nn.Conv2d(2, 2, 3, dilation=3),
    "asymmetric": nn.Conv2d(2, 2, (1, 7)),
    "grouped": nn.Conv2d(2, 2, 5, groups=2),
    "pooling": nn.AvgPool2d(3, 2),
    "transposed": nn.ConvTranspose2d(2, 2, 4, stride=2),
    "transposed_odd": nn.ConvTranspose2d(2, 2, 3, stride=2),
}
BODIES = {
    "plain": "Conv (%s, w)",
    "strided": "Conv <strides = [2, 2]> (%s, w)",
    "dilated": "Conv <dilations = [3, 3]> (%s, w)",
    "asymmetric": "Conv (%s, w)",
    "grouped": "Conv <group = 2> (%s, w)",
    "pooling": "AveragePool <kernel_shape = [3, 3], strides = [2, 2]> (%s)",
    "transposed": "ConvTranspose <strides = [2, 2]> (%s, w)",
    "transposed_odd": "ConvTranspose <strides = [2, 2]> (%s, w)",
}


@pytest.mark.parametrize("first", LAYERS)
@pytest.mark.parametrize("second", ["plain", "strided", "dilated", "asymmetric"])
def test_is_where_the_gradient_is_not_zero(first: str, second: str) -> None:
    arrays: dict[str, Any] = {}
    for name, layer in (("w", LAYERS[first]), ("v", LAYERS[second])):
        for parameter in layer.parameters():
            parameter.data.fill_(1.0)
        if hasattr(layer, "weight"):
            arrays[name] = np.asarray(layer.state_dict()["weight"])
    body = f"a = {BODIES[first] % 'x'}\ny = {BODIES[second].replace('w)', 'v)') % 'a'}"
    found = reach(graph(body, "float[N, 2, 39, 39] x", **arrays))
    assert found is not None
    image = torch.ones(1, 2, 39, 39, requires_grad=True)
    out = LAYERS[second](LAYERS[first](image))
    middle = [side // 2 for side in out.shape[2:]]
    extents = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # behind a stride neighbours may see one pixel more or less
        (gradient,) = torch.autograd.grad(
            out[0, :, middle[0] + row, middle[1] + column].sum(), image, retain_graph=True
        )
        seen = gradient[0].abs().sum(0).nonzero()
        extents.append((seen.max(0).values - seen.min(0).values + 1).tolist())
    assert found.size == tuple(max(side) for side in zip(*extents, strict=True))


def test_of_several_inputs_the_largest_counts() -> None:
    model = graph(
        "a = Conv <pads = [2, 2, 2, 2]> (x, w)\nb = Conv <pads = [0, 1, 0, 1]> (x, v)\ny = Concat <axis = 1> (b, a)",
        w=(3, 3, 5, 5),
        v=(3, 3, 1, 3),
    )
    assert size(model, "b") == (1, 3)
    assert size(model) == (5, 5)


GATED = """
a = Conv <pads = [1, 1, 1, 1]> (x, w)
p = GlobalAveragePool (a)
f = Conv (p, v)
s = Sigmoid (f)
y = {} (a, s)
"""


def test_a_gate_does_not_count_for_the_product_but_a_global_summand_does() -> None:
    gated, added = (graph(GATED.format(operator), w=(4, 3, 3, 3), v=(4, 4, 1, 1)) for operator in ("Mul", "Add"))
    assert size(gated, "s") == (math.inf, math.inf)
    assert size(gated) == (3, 3)
    assert size(added) == (math.inf, math.inf)


def test_a_product_of_maps_is_no_gate() -> None:
    model = graph(
        "a = Conv <pads = [1, 1, 1, 1]> (x, w)\nz = Softmax <axis = 2> (x)\nt = Softmax <axis = 3> (z)\ny = Mul (a, t)",
        w=(3, 3, 3, 3),
    )
    assert size(model) == (math.inf, math.inf)


def test_a_matrix_product_over_channels_sees_no_more_and_one_over_the_map_sees_everything() -> None:
    over_channels = """
    a = Conv (x, w)
    t = Transpose <perm = [0, 2, 3, 1]> (a)
    m = MatMul (t, v)
    y = Transpose <perm = [0, 3, 1, 2]> (m)
    """
    assert size(graph(over_channels, w=(4, 3, 3, 3), v=(4, 7))) == (3, 3)
    over_map = "a = Conv (x, w)\nf = Flatten (a)\ny = MatMul (f, v)"
    assert size(graph(over_map, outputs="float[N, C] y", w=(4, 3, 3, 3), v=(144, 7))) == (math.inf, math.inf)
    over_rows = "y = MatMul (x, v)"  # sums over the width alone
    assert size(graph(over_rows, v=(8, 5))) == (1, math.inf)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = GlobalMaxPool (x)", (math.inf, math.inf)),
        ("y = ReduceMean (x, axes)", (1, math.inf)),
        ("y = InstanceNormalization (x, s, s)", (math.inf, math.inf)),
        ("y = Softmax <axis = 1> (x)", (1, 1)),
        ("y = BatchNormalization (x, s, s, s, s)", (1, 1)),
        ("y = Relu (x)", (1, 1)),
    ],
)
def test_what_sees_everything_and_what_does_not(body: str, expected: tuple[float, ...]) -> None:
    arrays = {"axes": np.array([3]), "s": np.ones(3, np.float32)}
    used: dict[str, Any] = {name: array for name, array in arrays.items() if f"{name}," in body or f"{name})" in body}
    assert size(graph(body, **used)) == expected


def test_jumps() -> None:
    model = graph(
        """a = Conv <strides = [2, 2]> (x, w)
        b = MaxPool <kernel_shape = [2, 2], strides = [2, 1]> (a)
        y = ConvTranspose <strides = [4, 4]> (b, v)""",
        "float[N, 3, 33, 33] x",
        w=(4, 3, 3, 3),
        v=(4, 2, 4, 4),
    )
    jumps = {name: field.jump for name in "aby" if (field := reach(model, name)) is not None}
    assert jumps == {"a": (2, 2), "b": (4, 2), "y": (1, 0.5)}


def test_resize_reads_two_rows_and_divides_the_jump() -> None:
    body = 'a = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)\ny = Resize <mode = "linear"> (a, , scales)'
    found = reach(graph(body, scales=np.array([1, 1, 2, 2], np.float32)))
    assert found is not None
    assert (found.size, found.jump) == ((4, 4), (1, 1))


def test_channel_shuffle_keeps_height_and_width_apart() -> None:
    body = """
    a = Conv <pads = [0, 1, 0, 1]> (x, w)
    b = Reshape (a, grouped)
    c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
    d = Reshape (c, flat)
    y = Conv (d, v)
    """
    shapes: dict[str, Any] = {"grouped": np.array([0, 2, 2, 8, 8]), "flat": np.array([0, 4, 8, 8])}
    assert size(graph(body, w=(4, 3, 1, 3), v=(4, 4, 3, 1), **shapes)) == (3, 3)


def test_windows_of_a_map_are_not_taken_for_the_whole() -> None:
    """Attention within windows, as in Swin: what it sees is not claimed."""
    body = "a = Reshape (x, windows)\ny = Softmax <axis = 3> (a)"
    model = graph(body, outputs="float[A, B, C, D, E, F] y", windows=np.array([0, 3, 2, 4, 2, 4]))
    assert reach(model) is None


@pytest.mark.parametrize("operator", ["GatherND", "Einsum"])
def test_what_is_not_known_is_not_guessed(operator: str) -> None:
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "GatherND": ("a = GatherND <batch_dims = 0> (x, i)\ny = Relu (a)", {"i": np.array([[[[0, 0, 0, 0]]]])}),
        "Einsum": ('a = Einsum <equation = "nchw,cd->ndhw"> (x, w)\ny = Relu (a)', {"w": (3, 4)}),
    }
    body, arrays = bodies[operator]
    outputs = "float[A, B, C] y" if operator == "GatherND" else "float[A, B, C, D] y"
    assert reach(graph(body, outputs=outputs, **arrays)) is None


def test_depthwise_is_told_from_grouped() -> None:
    model = graph(
        "a = Conv <group = 4> (x, w)\ny = Conv <group = 2> (a, v)",
        "float[N, 4, 8, 8] x",
        w=(4, 1, 3, 3),
        v=(4, 2, 3, 3),
    )
    first, second = (window_of(node) for node in model.graph)
    assert first is not None
    assert second is not None
    assert (first.groups, first.depthwise) == (4, True)
    assert (second.groups, second.depthwise) == (2, False)


# --- Slices with steps, blocks, and whole axes -------------------------------------------------------------------

SLICE = "{} = Slice (x, {}, ends, axes, steps)\n"
STEPS: dict[str, Any] = {"ends": np.array([99, 99]), "axes": np.array([2, 3]), "steps": np.array([2, 2])}
CONV = "y = Conv <pads = [1, 1, 1, 1]> ({}, w)"


@pytest.mark.parametrize(
    ("first", "channels", "field", "jump"),
    [
        ("a = SpaceToDepth <blocksize = 2> (x)", 16, 2 + 2 * 2, 2),
        ("a = DepthToSpace <blocksize = 2> (x)", 1, 1 + 2 * 0.5, 0.5),
        (SLICE.format("a", "s"), 4, 1 + 2 * 2, 2),
        (SLICE.format("a", "s").replace("steps", "ones"), 4, 3, 1),
        ("a = Slice (x, s, ends, axes)", 4, 3, 1),
    ],
)
def test_a_3x3_convolution_behind_what_changes_the_jump(first: str, channels: int, field: float, jump: float) -> None:
    arrays = STEPS | {"s": np.array([1, 0]), "ones": np.array([1, 1]), "w": (5, channels, 3, 3)}
    used = {name: array for name, array in arrays.items() if name in f"{first}w"}
    found = reach(graph(f"{first}\n{CONV.format('a')}", "float[N, 4, 8, 8] x", **used))
    assert found is not None
    assert (found.size, found.jump) == ((field, field), (jump, jump))


def test_slices_that_begin_at_different_pixels_see_a_block_together() -> None:
    """The first layer of YOLOv5, four slices by 2: the same as SpaceToDepth."""
    starts: dict[str, Any] = {f"s{r}{c}": np.array([r, c]) for r in (0, 1) for c in (0, 1)}
    body = "".join(SLICE.format(f"a{name}", name) for name in starts)
    body += f"c = Concat <axis = 1> ({', '.join(f'a{name}' for name in starts)})\n{CONV.format('c')}"
    found = reach(graph(body, "float[N, 4, 8, 8] x", w=(5, 16, 3, 3), **starts, **STEPS))
    assert found is not None
    assert (found.size, found.jump) == ((6, 6), (2, 2))


def test_a_shortcut_behind_one_slice_adds_nothing() -> None:
    body = f"{SLICE.format('a', 's')}b = Conv <pads = [1, 1, 1, 1]> (a, w)\ny = Add (a, b)"
    assert size(graph(body, "float[N, 4, 8, 8] x", w=(4, 4, 3, 3), s=np.array([1, 1]), **STEPS)) == (5, 5)


@pytest.mark.parametrize("steps", [[-1, 1], None])
def test_a_flip_and_steps_that_are_computed_are_not_known(steps: list[int] | None) -> None:
    arrays: dict[str, Any] = {"s": np.array([7, 0]), "ends": np.array([-99, 99]), "axes": np.array([2, 3])}
    if steps is not None:
        assert reach(graph(SLICE.format("y", "s"), steps=np.array(steps), **arrays)) is None
        return
    computed = "f = ReduceMax <keepdims = 0> (x, all)\nk = Cast <to = 7> (f)\nsteps = Expand (k, two)\n"
    arrays |= {"all": np.array([0, 1, 2, 3]), "two": np.array([2])}
    assert reach(graph(computed + SLICE.format("y", "s"), **arrays)) is None


def test_a_convolution_over_blocks_made_by_reshapes_is_not_known() -> None:
    body = "a = Reshape (x, cut)\nb = Transpose <perm = [0, 1, 3, 5, 2, 4]> (a)\nc = Reshape (b, flat)\n"
    shapes: dict[str, Any] = {"cut": np.array([0, 3, 4, 2, 4, 2]), "flat": np.array([0, 12, 4, 4])}
    assert reach(graph(body + CONV.format("c"), w=(5, 12, 3, 3), **shapes)) is None


@pytest.mark.parametrize(
    ("opset", "body", "expected"),
    [
        (11, "y = Softmax (x)", (math.inf, math.inf)),  # over channels, height and width as one
        (11, "y = LogSoftmax <axis = 3> (x)", (1, math.inf)),
        (11, "y = Hardmax <axis = 2> (x)", (math.inf, math.inf)),
        (13, "y = Softmax (x)", (1, math.inf)),
        (13, "y = LogSoftmax <axis = 2> (x)", (math.inf, 1)),
        (13, "y = Hardmax <axis = 1> (x)", (1, 1)),
        (19, "y = CumSum (x, two)", (math.inf, 1)),
        (19, "y = ReduceSum (x, two)", (math.inf, 1)),
        (19, "y = ReduceSum (x)", (math.inf, math.inf)),
        (19, "y = ReduceSum <noop_with_empty_axes = 1> (x)", (1, 1)),
    ],
)
def test_axes_that_are_summed_over(opset: int, body: str, expected: tuple[float, ...]) -> None:
    arrays: dict[str, Any] = {"two": np.array([2])} if "two" in body else {}
    if "CumSum" in body:
        arrays["two"] = np.array(2)
    assert size(graph(body, opset=opset, **arrays)) == expected


def test_an_axis_that_is_computed_is_not_known() -> None:
    body = "f = ReduceMax <keepdims = 0> (x, all)\nk = Cast <to = 7> (f)\ny = CumSum (x, k)"
    assert reach(graph(body, all=np.array([0, 1, 2, 3]))) is None
