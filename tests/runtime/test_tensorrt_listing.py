"""Kernels read from real logs of TensorRT-RTX, and from inspector JSON; the oracle is counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime.audit import audited, traffic
from edgewright.runtime.backends.tensorrt_listing import kernels_of_inspector, kernels_of_log
from edgewright.runtime.errors import BuildError
from edgewright.runtime.specs import Kernel, PlannedLayer

LISTINGS = Path(__file__).parent / "listings"
LAYERS = [PlannedLayer("conv", "Conv", "int8", 3), PlannedLayer("next", "Conv", "int8", 2)]
LAYERS.append(PlannedLayer("head", "Gemm", "fp16", 1))


def text(name: str) -> str:
    return (LISTINGS / name).read_text()


def line(kind: str = "correlation", inputs: str = "", constants: str = "", metadata: str = "") -> str:
    return (
        f"Name: k, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{tensor('y', 'Float')}], "
        f"TacticName: t, StreamId: 0, Metadata: {metadata}"
    )


def tensor(name: str, kind: str, dimensions: str = "-1,4,2,2") -> str:
    return (
        f" {{ Name: {name}, Dimensions: [{dimensions}], Strides: [16,4,2,1], StrideOrder: [3,2,1,0], Datatype: {kind}, "
        "Format: (Linear) Row major linear format }"
    )


def kernel_of(line: str) -> Kernel:
    (kernel,) = kernels_of_log([f"Layers:\n{line}"])
    return kernel


def actual(kernels: tuple[Kernel, ...]) -> list[tuple[str, str]]:
    return [(layer.actual, layer.kernel) for layer in audited(LAYERS, kernels)]


# --- the log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fp32-sm86", [("fp32", "conv_myl0_2"), ("fp32", "next_myl0_3"), ("fp32", "__myl_FcAdd_myl0_6")]),
        ("fp16-sm86", [("fp16", "conv_myl0_2"), ("fp16", "next_myl0_3"), ("fp16", "__myl_FcAddCast_myl0_6")]),
        # the convolution's bias is added by another kernel, whose data are floats
        ("int8-sm86", [("int8", "conv_myl0_2"), ("int8", "next_myl0_4"), ("fp16", "__myl_FcAddCast_myl0_6")]),
        # Turing: what is INT8 in the graph is multiplied in FP16
        ("int8-sm75", [("fp16", "conv_myl0_3"), ("fp16", "next_myl0_6"), ("fp16", "head_myl0_9")]),
    ],
)
def test_precision_of_each_layer(name: str, found: list[tuple[str, str]]) -> None:
    assert actual(kernels_of_log([text(f"rtx-1.7-{name}.txt")])) == found


@pytest.mark.parametrize(("name", "count"), [("fp32-sm86", 6), ("fp16-sm86", 6), ("int8-sm86", 6), ("int8-sm75", 10)])
def test_shape_calls_are_no_kernels(name: str, count: int) -> None:
    listing = text(f"rtx-1.7-{name}.txt")
    kernels = kernels_of_log([listing])
    assert len(kernels) == count
    assert listing.count("LayerType: ") == count + 1
    assert "shape_call" not in {kernel.kind for kernel in kernels}


def test_bytes_are_those_of_one_image() -> None:
    kernels = {kernel.name: kernel for kernel in kernels_of_log([text("rtx-1.7-int8-sm86.txt")])}
    conv = kernels["conv_myl0_2"]
    scales = 2 * 32 * 4
    assert conv.bytes_read == 16 * 8 * 8 + 32 * 16 * 3 * 3 + scales
    assert conv.bytes_written == 32 * 8 * 8 * 4  # float, for the kernel that adds the bias
    head = kernels["__myl_FcAddCast_myl0_6"]
    assert (head.bytes_read, head.bytes_written) == (2 * (64 + 8 * 64 + 8), 8 * 4)
    assert conv.sources == ("conv", "d1", "w1")
    assert [kernel.name for kernel in kernels.values() if kernel.computes] == [conv.name, "next_myl0_4", head.name]


def test_fp16_moves_half_of_what_fp32_moves() -> None:
    fp32, fp16 = (traffic(kernels_of_log([text(f"rtx-1.7-{name}-sm86.txt")])) for name in ("fp32", "fp16"))
    assert fp32 is not None
    assert fp16 is not None
    assert fp16.kernels == fp32.kernels
    assert 0.5 <= fp16.bytes_moved / fp32.bytes_moved < 0.55  # input and output stay float


def test_the_last_listing_counts() -> None:
    earlier, last = line(metadata="[ONNX Layer: a]"), line(metadata="[ONNX Layer: b]")
    (kernel,) = kernels_of_log(["before", f"Layers:\n{earlier}\n", f"Layers:\n{last}\n\nI/O Tensors:\n x", "after"])
    assert kernel.sources == ("b",)


@pytest.mark.parametrize(
    ("inputs", "constants", "precision"),
    [
        ([("Int8", "-1,4,2,2")], [("Int8", "4,4,1,1"), ("Float", "1,4,1,1")], "int8"),
        ([("Half", "-1,4,2,2")], [("Half", "4,4,1,1"), ("Float", "1,4,1,1")], "fp16"),
        ([("Float", "-1,4,2,2")], [("Float", "4,4,1,1")], "fp32"),
        ([("BFloat16", "-1,4,2,2")], [("BFloat16", "4,4,1,1")], "bf16"),
        ([("Half", "-1,4,2,2")], [("Int8", "4,4,1,1"), ("Half", "1,4,1,1")], "fp16"),  # only the weights are INT8
        ([("Int8", "-1,4,2,2"), ("Half", "-1,4,2,2")], [("Int8", "4,4,1,1")], "int8"),  # with a residual
        ([("Half", "-1,4,2,2"), ("Float", "-1,4,2,2")], [("Half", "4,4,1,1")], "fp16"),  # with a float residual
        ([("Int8", "-1,4,2,2")], [("Half", "4,4,1,1")], "fp16"),
        ([("Half", "-1,4,2,2"), ("Half", "4,4,1,1")], [("Float", "1")], "fp16"),  # weights from another kernel
        ([("Int8", "-1,4"), ("Int8", "4,4")], [], "int8"),  # a product of two activations
        ([("Int8", "-1,4"), ("Half", "4,4")], [], "fp16"),
    ],
)
def test_precision_of_a_product(inputs: list[Any], constants: list[Any], precision: str) -> None:
    read, fixed = (
        ",".join(tensor(f"{side}{index}", *entry) for index, entry in enumerate(entries))
        for side, entries in (("i", inputs), ("c", constants))
    )
    assert kernel_of(line("correlation", read, fixed)).precision == precision


@pytest.mark.parametrize(
    ("inputs", "constants", "precision"),
    [
        ("Float", "Half", "fp32"),
        ("Int8", "", "int8"),  # a pooling of integers
        ("Int8", "Half", "fp16"),
        ("Int64", "", "int64"),
    ],
)
def test_precision_of_other_kernels(inputs: str, constants: str, precision: str) -> None:
    kernel = kernel_of(line("kgen", tensor("x", inputs), tensor("c", constants, "1") if constants else ""))
    assert (kernel.precision, kernel.computes) == (precision, False)


def test_a_tensor_listed_twice_is_read_once() -> None:
    once, twice = tensor("x", "Half"), f"{tensor('x', 'Half')},{tensor('x', 'Half')}"
    assert kernel_of(line("kgen", once)).bytes_read == kernel_of(line("kgen", twice)).bytes_read == 4 * 2 * 2 * 2


@pytest.mark.parametrize("separator", ["\x1f", "\x1e", ""])
@pytest.mark.parametrize("names", [["a", "b"], ["blocks.0/Conv", "x, y]z", "[w] {é} LayerType: 'q'"], ["only"]])
def test_sources_keep_odd_characters(separator: str, names: list[str]) -> None:
    metadata = separator.join(f"[ONNX Layer: {name}]" for name in names)
    assert kernel_of(line(metadata=metadata)).sources == tuple(names)
    assert kernel_of(line(metadata=metadata + "__gemm_from_conv1x1")).sources == tuple(names)


def test_a_layer_that_only_another_kind_of_kernel_runs_is_found() -> None:
    """A convolution of four channels becomes multiplications and additions."""
    small = line("kgen", tensor("x", "Half"), tensor("w", "Half"), "[ONNX Layer: conv]__gemm_from_conv1x1")
    assert actual(kernels_of_log([f"Layers:\n{small}"])) == [("fp16", "k"), ("missing", ""), ("missing", "")]


def test_of_two_products_for_a_layer_the_wider_counts() -> None:
    half, integer = (
        line("gemm", tensor("x", word), tensor("w", word), "[ONNX Layer: conv]") for word in ("Half", "Int8")
    )
    for order in ((half, integer), (integer, half)):
        assert actual(kernels_of_log(["Layers:\n" + "\n".join(order)]))[0] == ("fp16", "k")


def test_a_layer_without_source_has_none() -> None:
    assert kernel_of(line("kgen")).sources == ()


@pytest.mark.parametrize(
    ("messages", "fact"),
    [
        ([], "the builder listed no layers"),
        (["Adding 1 engine(s) to plan file."], "the builder listed no layers"),
        (["Layers:\n\nI/O Tensors:"], "the engine has no kernels"),
        ([f"Layers:\n{line('shape_call')}"], "the engine has no kernels"),
        (["Layers:\nconv\nrelu"], "the log has the layer 'conv'"),
        ([f"Layers:\n{line()}\n{line().replace('Constants', 'Consts')}"], "the log has the layer 'Name: k, "),
        ([f"Layers:\n{line()[:60]}"], "the log has the layer 'Name: k, "),
        ([f"Layers:\n{line(inputs=tensor('x', 'Half').replace('Datatype', 'Type'))}"], "the log has the tensors"),
        ([f"Layers:\n{line(inputs=tensor('x', 'Half', '4,N'))}"], "the log has the tensors"),
        ([f"Layers:\n{line(inputs=tensor('x', 'Posit16'))}"], "tensor 'x' has the type 'Posit16'"),
    ],
)
def test_a_listing_that_cannot_be_read_is_an_error(messages: list[str], fact: str) -> None:
    with pytest.raises(BuildError, match="cannot read what was built") as caught:
        kernels_of_log(messages)
    assert fact in caught.value.message
    assert "\n" not in str(caught.value)


# --- the inspector's JSON ----------------------------------------------------------------------------------------


def test_inspector_of_tensorrt_10() -> None:
    kernels = kernels_of_inspector(text("inspector-10.json"))
    assert [(kernel.precision, kernel.computes) for kernel in kernels] == [
        ("fp32", False),
        ("int8", True),
        ("fp16", True),
        ("fp16", False),
        ("fp16", True),
    ]
    assert actual(kernels) == [("int8", "conv + relu"), ("fp16", "next"), ("fp16", "__myl_FcAdd_myl0_1")]
    assert (kernels[1].bytes_read, kernels[1].bytes_written) == (16 * 64 + 4608 + 32 * 4, 32 * 64 * 2)
    assert kernels[1].sources == ("conv", "relu")
    assert kernels[4].sources == ("head", "out")


def test_inspector_of_tensorrt_11() -> None:
    kernels = kernels_of_inspector(text("inspector-11.json"))
    assert [kernel.kind for kernel in kernels] == ["correlation", "kgen", "correlation"]
    assert actual(kernels)[:2] == [("int8", "conv_myl0_1"), ("bf16", "next_myl0_3")]
    assert (kernels[0].bytes_read, kernels[0].bytes_written) == (16 * 64 + 32 * 16 * 9 + 32 * 4, 32 * 64 * 4)


def changed(**changes: Any) -> str:
    content = json.loads(text("inspector-10.json"))
    content["Layers"][1].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("", "no list of layers"),
        ("no JSON", "no list of layers"),
        ("[]", "no list of layers"),
        ('{"Bindings": []}', "no list of layers"),
        ('{"Layers": "conv"}', "the inspector's layers are no list"),
        ('{"Layers": []}', "the engine has no kernels"),
        ('{"Layers": ["conv", "next"], "Bindings": ["x"]}', "the inspector gives no details of the layer 'conv'"),
        (changed(Inputs=[{"Name": "x8"}]), "the inspector has the layer"),
        (changed(Inputs=[{"Name": "x8", "Dimensions": "?", "Format/Datatype": "Half"}]), "the inspector has the layer"),
        (
            changed(Inputs=[{"Name": "x8", "Dimensions": [1], "Format/Datatype": "N/A due to dynamic shapes"}]),
            "tensor 'x8' has the type 'N/A due to dynamic shapes'",
        ),
    ],
)
def test_inspector_text_that_cannot_be_read_is_an_error(content: str, fact: str) -> None:
    with pytest.raises(BuildError, match="cannot read what was built") as caught:
        kernels_of_inspector(content)
    assert fact in caught.value.message


def test_synchronization_between_streams_is_no_kernel() -> None:
    tensor = "{ Name: x, Dimensions: [-1,4], Strides: [4,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row }"
    empty = "Inputs: [], Constants: [], Outputs: [], TacticName: "
    lines = [
        f"Name: s, LayerType: signal, {empty}, StreamId: 0, EventId: 34, Metadata: ",
        f"Name: w, LayerType: wait, {empty}, StreamId: 1, EventId: 34, Metadata: ",
        f"Name: k, LayerType: kgen, Inputs: [ {tensor}], Constants: [], Outputs: [ {tensor}], TacticName: t, "
        "StreamId: 1, Metadata: [ONNX Layer: relu]",
    ]
    (kernel,) = kernels_of_log(["Layers:\n" + "\n".join(lines)])
    assert (kernel.name, kernel.sources, kernel.precision, kernel.bytes_read) == ("k", ("relu",), "fp16", 8)
