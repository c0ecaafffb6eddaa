"""The linter finds what TensorRT refuses or misreads, leaves near misses alone, and agrees with a real parser."""

from __future__ import annotations

import importlib
import types
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.optimize.lint import Finding, check, lint
from edgewright.optimize.lint_rules import PARSERS, RULES
from edgewright.runtime.errors import QuantizationError

Array = NDArray[Any]

IMAGE, HALF_IMAGE = "float[1, 3, 8, 8] x", "float16[1, 3, 8, 8] x"
MAP, HALF_MAP = "float[N, C, H, L] y", "float16[N, C, H, L] y"
PAIR = "[q] i = QuantizeLinear (x, s, z) [d] r = DequantizeLinear (i, s, z)"
WEIGHT = "[wd] v = DequantizeLinear <axis = 0> (w, ws, wz)"
INT8 = f"{PAIR} {WEIGHT} [c] y = Conv (r, v, b)"  # what the rules ask for
ALONE = "[q] i = QuantizeLinear (x, s, z) [d] y = DequantizeLinear (i, s, z)"
BEHIND_E = "[q] i = QuantizeLinear (e, s, z) [d] y = DequantizeLinear (i, s, z)"
BEHIND_RELU = f"[r] e = Relu (x) {BEHIND_E}"
MICROSOFT = ', "com.microsoft": 1'


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def integers(*shape: int, kind: type[np.generic] = np.int8) -> Array:
    return np.random.default_rng(zlib.crc32(bytes(shape))).integers(-127, 128, shape).astype(np.int8).view(kind)


def scale(value: float = 0.05, *shape: int, kind: type[np.generic] = np.float32) -> Array:
    return np.full(shape, value, kind)


def zeros(*shape: int, kind: type[np.generic] = np.int8) -> Array:
    return np.zeros(shape, kind)


def half(array: Array) -> Array:
    return array.astype(np.float16)


# Of INT8 above: Conv with weights [4, 3, 3, 3]
STORED: dict[str, Any] = {
    "s": scale(),
    "z": zeros(),
    "w": integers(4, 3, 3, 3),
    "ws": scale(0.01, 4),
    "wz": zeros(4),
    "b": normal("b", 4),
}
HALVES = STORED | {name: half(STORED[name]) for name in ("s", "ws", "b")}


@dataclass(frozen=True)
class Graph:
    """A graph in textual syntax; of `arrays` those that the text names become initializers."""

    body: str
    arrays: dict[str, Any] = field(default_factory=lambda: STORED)
    inputs: str = IMAGE
    outputs: str = MAP
    opset: int = 19
    imports: str = ""
    functions: str = ""

    def proto(self) -> onnx.ModelProto:
        proto = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": {self.opset}{self.imports}]> '
            f"agraph ({self.inputs}) => ({self.outputs}) {{ {self.body} }} {self.functions}"
        )
        made = {output for node in proto.graph.node for output in node.output} | {i.name for i in proto.graph.input}
        read = {name for node in proto.graph.node for name in node.input}
        for name in (name for name in self.arrays if name in read - made):
            array = self.arrays[name]
            tensor = array if isinstance(array, onnx.TensorProto) else onnx.numpy_helper.from_array(array, name)
            proto.graph.initializer.append(tensor)
        return proto

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())


def tensor(name: str, kind: int, shape: list[int], values: list[float]) -> onnx.TensorProto:
    return onnx.helper.make_tensor(name, kind, shape, values)


def conv(**arrays: Any) -> Graph:
    """INT8 with other constants."""
    return Graph(INT8, STORED | arrays)


def changed(old: str, new: str, arrays: dict[str, Any] = STORED, **more: Any) -> Graph:
    """INT8 with another text."""
    assert old in INT8
    return Graph(INT8.replace(old, new), arrays, **more)


def product(layer: str, axis: int, channels: int, shape: tuple[int, int]) -> Graph:
    """A quantized weight of `shape` with scales along `axis`, read by `layer`."""
    body = f"{PAIR} [wd] v = DequantizeLinear <axis = {axis}> (w, ws, wz) [g] y = {layer} (r, v)"
    arrays = STORED | {"w": integers(*shape), "ws": scale(0.01, channels), "wz": zeros(channels)}
    return Graph(body, arrays, "float[2, 6] x", "float[N, M] y")


def transposed(axis: int, channels: int) -> Graph:
    arrays = STORED | {"w": integers(3, 4, 3, 3), "ws": scale(0.01, channels), "wz": zeros(channels)}
    return Graph(INT8.replace("axis = 0", f"axis = {axis}").replace("= Conv", "= ConvTranspose"), arrays)


def blocked(axis: int, scales: tuple[int, ...]) -> Graph:
    body = f"[wd] v = DequantizeLinear <axis = {axis}, block_size = 32> (w, ws, wz) [g] y = MatMul (x, v)"
    arrays = {"w": integers(2, 64, 32), "ws": scale(0.01, *scales), "wz": zeros(*scales)}
    return Graph(body, arrays, "float[2, 2, 64] x", "float[A, N, M] y", opset=21)


FLOAT_CONV = Graph("[c] y = Conv (x, w, b)", {"w": normal("w", 4, 3, 3, 3), "b": normal("b", 4)})
HALF_CONV = Graph(FLOAT_CONV.body, {name: half(a) for name, a in FLOAT_CONV.arrays.items()}, HALF_IMAGE, HALF_MAP)
HALF_INT8 = Graph(INT8, HALVES, HALF_IMAGE, HALF_MAP)
FLOAT_WEIGHT = changed(
    WEIGHT,
    "[wq] k = QuantizeLinear <axis = 0> (w, ws, wz) [wd] v = DequantizeLinear <axis = 0> (k, ws, wz)",
    STORED | {"w": normal("w", 4, 3, 3, 3)},
)
TWICE = '<domain: "local", opset_import: ["": 19]> twice (a) => (b) { [add] b = Add (a, a) }'
UINT8_IMAGE = "uint8[1, 3, 8, 8] x"


@dataclass(frozen=True)
class Case:
    """A rule, a graph that breaks it at `node`, and one that nearly does."""

    rule: str
    node: str
    broken: Graph
    sound: Graph
    target: str = "rtx"


CASES = (
    # --- The graph
    Case("newer-opset", "agraph", Graph("[r] y = Relu (x)", opset=23), Graph("[r] y = Relu (x)", opset=22)),
    Case(
        "newer-opset",  # the node whose definition is newer is named
        "q",
        Graph(BEHIND_RELU, opset=21),
        Graph(BEHIND_RELU, opset=20),
        "10.3",
    ),
    Case(
        "custom-operator",
        "f",
        Graph('[f] y = com.microsoft.FusedConv <activation = "Relu"> (x, w)', FLOAT_CONV.arrays, imports=MICROSOFT),
        Graph("[f] y = local.twice (x)", imports=', "local": 1', functions=TWICE),
    ),
    Case(
        "ignored-domain",
        "g",
        Graph("[g] y = com.microsoft.Gelu (x)", imports=MICROSOFT),
        Graph("[g] y = Gelu (x)", imports=MICROSOFT, opset=20),  # an import that nothing uses
    ),
    Case(
        "ignored-domain",
        "q",
        Graph(
            "[q] i = com.microsoft.QuantizeLinear (x, s, z) [d] y = com.microsoft.DequantizeLinear (i, s, z)",
            imports=MICROSOFT,
        ),
        Graph(ALONE),
    ),
    *(
        Case("integer-operator", "c", graph, conv())
        for graph in (
            Graph(f"{PAIR} [c] k = QLinearConv (i, s, z, w, ws, wz, s, z) [e] y = DequantizeLinear (k, s, z)"),
            Graph("[c] y = ConvInteger (x, w)", inputs="int8[1, 3, 8, 8] x", outputs="int32[N, C, H, L] y"),
            Graph("[c] y = MatMulInteger (x, x)", inputs="int8[6, 6] x", outputs="int32[N, M] y"),
            Graph("[c] y = QLinearMatMul (x, s, z, x, s, z, s, z)", inputs="int8[6, 6] x", outputs="int8[N, M] y"),
            Graph("[c] y, ys, yz = DynamicQuantizeLinear (x)", outputs="uint8[1, 3, 8, 8] y"),
            Graph(
                "[c] y = com.microsoft.QLinearAdd (x, s, z, x, s, z, s, z)",
                inputs="int8[6, 6] x",
                outputs="int8[6, 6] y",
                imports=MICROSOFT,
            ),
            Graph(
                "[c] y = com.microsoft.QGemm (x, s, z, x, s, z)",
                inputs="int8[6, 6] x",
                outputs="float[6, 6] y",
                imports=MICROSOFT,
            ),
        )
    ),
    Case(
        "float64",
        "m",
        Graph("[k] a = Cast <to = 11> (x) [m] e = Mul (a, a) [l] y = Cast <to = 1> (e)"),
        Graph("[k] a = Cast <to = 1> (n) [m] y = Mul (x, a)", {"n": np.array(2.0)}),
    ),
    Case(
        "float64",
        "r",
        Graph("[r] y = Relu (x)", inputs="double[1, 3, 8, 8] x", outputs="double[1, 3, 8, 8] y"),
        Graph("[r] y = Relu (x)"),
    ),
    Case(
        "uint8-tensor",
        "k",
        Graph("[k] a = Cast <to = 2> (x) [l] y = Cast <to = 1> (a)"),
        Graph("[k] y = Cast <to = 2> (x)", outputs="uint8[1, 3, 8, 8] y"),
    ),
    Case(
        "uint8-tensor",
        "t",
        Graph("[t] y = Transpose (x)", inputs=UINT8_IMAGE, outputs="uint8[8, 8, 3, 1] y"),
        Graph("[k] a = Cast <to = 1> (x) [t] y = Transpose (a)", inputs=UINT8_IMAGE),
    ),
    Case("mixed-types", "c", conv(ws=half(STORED["ws"])), HALF_INT8),
    Case("mixed-types", "c", conv(b=half(STORED["b"])), conv()),
    # --- Integers
    Case(
        "int32-dequantize",
        "bd",
        Graph(
            f"{PAIR} {WEIGHT} [bd] e = DequantizeLinear (j, s) [c] y = Conv (r, v, e)",
            STORED | {"j": np.arange(4, dtype=np.int32)},
        ),
        conv(),
    ),
    Case(
        "quantized-type",
        "wd",
        conv(w=integers(4, 3, 3, 3, kind=np.uint8), wz=zeros(4, kind=np.uint8)),
        conv(),
    ),
    Case(
        "quantized-type", "q", Graph(ALONE, {"s": scale(), "z": zeros(kind=np.int16)}, opset=21), Graph(ALONE, opset=21)
    ),
    Case(
        "quantized-type",
        "q",
        Graph("[q] i = QuantizeLinear <output_dtype = 2> (x, s) [d] y = DequantizeLinear (i, s)", opset=21),
        Graph("[q] i = QuantizeLinear <output_dtype = 3> (x, s) [d] y = DequantizeLinear (i, s)", opset=21),
    ),
    Case(
        "quantized-type",
        "q",
        Graph(f"[k] e = Cast <to = 6> (x) {BEHIND_E}"),
        Graph(f"[k] e = Cast <to = 1> (x) {BEHIND_E}"),
    ),
    Case(
        "int8-constant",
        "t",
        changed(WEIGHT, f"[t] h = Identity (w) {WEIGHT.replace('(w', '(h')}"),
        changed(WEIGHT, f"{WEIGHT.replace('v =', 'h =')} [t] v = Identity (h)"),
    ),
    Case("stray-int8", "q", Graph("[q] y = QuantizeLinear (x, s, z)", outputs="int8[1, 3, 8, 8] y"), conv(), "10.3"),
    Case(
        "stray-int8",
        "q",
        Graph("[q] i = QuantizeLinear (x, s, z) [p] p = Transpose (i) [d] y = DequantizeLinear (p, s, z)"),
        Graph(f"{ALONE} [e] k = DequantizeLinear (i, s, z)"),  # two readers, both DequantizeLinear
        "11",
    ),
    Case(
        "stray-int8",
        "d",
        Graph("[d] y = DequantizeLinear (x, s, z)", inputs="int8[1, 3, 8, 8] x"),
        FLOAT_WEIGHT,
        "10.13",
    ),
    Case(
        "quantized-bias",
        "c",
        Graph(
            f"{PAIR} {WEIGHT} [bq] j = QuantizeLinear (b, s, z) [bd] e = DequantizeLinear (j, s, z) "
            "[c] y = Conv (r, v, e)"
        ),
        conv(),
    ),
    # --- Zero-points
    Case("zero-point", "q", conv(z=np.array(3, np.int8)), conv()),
    Case("zero-point", "q", conv(z=np.array(128, np.uint8)), conv()),
    Case("zero-point", "wd", conv(wz=np.array([0, 1, 0, 0], np.int8)), conv()),
    Case(
        "zero-point",
        "q",
        Graph(INT8, inputs=f"{IMAGE}, int8[] z"),
        changed("[q]", "[o] z = Constant <value = int8 {0}> () [q]"),
    ),
    Case("zero-point-shape", "wd", conv(wz=zeros(1)), conv()),
    Case("uint8-zero-point", "q", conv(z=zeros(kind=np.uint8)), conv()),
    Case(
        "uint8-default",
        "q",
        Graph(INT8.replace("s, z)", "s)")),
        changed("(w, ws, wz)", "(w, ws)"),  # DequantizeLinear has the type of its input
    ),
    # --- Scales
    Case(
        "scale-constant",
        "q",
        Graph(ALONE, inputs=f"{IMAGE}, float[] s"),
        changed("[q]", "[o] s = Constant <value = float {0.05}> () [q]"),
    ),
    Case(
        "scale-constant",
        "q",
        Graph(ALONE, inputs=f"{IMAGE}, float[] s"),
        changed("[q]", "[o] n = Cast <to = 1> (k) [p] s = Identity (n) [q]", STORED | {"k": half(scale())}),
    ),
    *(Case("scale-value", "q", conv(s=scale(value)), conv(s=scale(1e-30))) for value in (0.0, -0.05, np.nan)),
    Case("scale-value", "wd", conv(ws=np.array([0.1, 0.0, 0.1, 0.1], np.float32)), conv()),
    Case(
        "scale-value",
        "q",
        Graph(INT8, HALVES | {"s": half(scale(1e-9))}, HALF_IMAGE, HALF_MAP),  # zero in FP16
        Graph(INT8, HALVES | {"s": half(scale(1e-6))}, HALF_IMAGE, HALF_MAP),  # subnormal in FP16, exact in FP32
    ),
    *(Case("scale-range", "q", conv(s=scale(value)), conv(s=scale(1e-37))) for value in (np.inf, 1e-40)),
    Case("scale-type", "q", Graph(INT8, STORED, HALF_IMAGE), HALF_INT8),
    Case("scale-type", "q", Graph(INT8, STORED, HALF_IMAGE, opset=23), HALF_INT8, "11"),
    Case("scale-shape", "q", conv(s=scale(0.05, 1, 1, 1, 1), z=zeros(1, 1, 1, 1)), conv(s=scale(0.05, 1), z=zeros(1))),
    Case("scale-shape", "wd", conv(ws=scale(0.01, 4, 1, 1, 1), wz=zeros(4, 1, 1, 1)), conv()),
    Case("scale-length", "wd", conv(ws=scale(0.01, 3), wz=zeros(3)), conv()),
    Case("scale-opset", "q", Graph(INT8, HALVES, HALF_IMAGE, HALF_MAP, opset=18), HALF_INT8),
    Case(
        "scale-opset",
        "wd",
        changed("<axis = 0> ", "", opset=12),
        changed("<axis = 0> ", "", STORED | {"ws": scale(), "wz": zeros()}, opset=12),
    ),
    Case(
        "activation-axis",
        "q",
        Graph(ALONE.replace("Linear", "Linear <axis = 1>"), {"s": scale(0.05, 3), "z": zeros(3)}),
        Graph(ALONE.replace("Linear", "Linear <axis = 1>"), {"s": scale(0.05, 1), "z": zeros(1)}),
    ),
    Case("weight-axis", "wd", changed("axis = 0", "axis = 1", STORED | {"ws": scale(0.01, 3), "wz": zeros(3)}), conv()),
    Case(
        "weight-axis",
        "wd",
        changed("axis = 0", "axis = -2", STORED | {"ws": scale(0.01, 3), "wz": zeros(3)}),
        changed("axis = 0", "axis = -4"),
    ),
    Case("weight-axis", "wd", transposed(0, 3), transposed(1, 4)),
    Case("weight-axis", "wd", product("Gemm", 0, 6, (6, 5)), product("Gemm", 1, 5, (6, 5))),
    Case("weight-axis", "wd", product("Gemm <transB = 1>", 1, 6, (5, 6)), product("Gemm <transB = 1>", 0, 5, (5, 6))),
    Case("weight-axis", "wd", product("MatMul", 0, 6, (6, 5)), product("MatMul", 1, 5, (6, 5))),
    Case(
        "default-axis",
        "wd",
        Graph(
            product("MatMul", 1, 5, (6, 5)).body.replace("<axis = 1> ", ""),
            product("MatMul", 1, 5, (6, 5)).arrays,
            "float[2, 6] x",
            "float[N, M] y",
        ),
        product("MatMul", 1, 5, (6, 5)),
        "10.3",
    ),
    Case("block-axis", "wd", blocked(0, (1, 64, 32)), blocked(1, (2, 2, 32))),
)

DEPTHWISE = STORED | {"w": integers(3, 1, 3, 3), "ws": scale(1, 3), "wz": zeros(3), "b": normal("b", 3)}
SOUND = (
    FLOAT_CONV,
    HALF_CONV,
    conv(),
    HALF_INT8,
    FLOAT_WEIGHT,
    changed("Conv (", "Conv <group = 3> (", DEPTHWISE),
    Graph(INT8, STORED | {"z": zeros(1)}, f"{IMAGE}, float[1] s = {{0.05}}"),  # an initializer that is an input too
)


def names(cases: tuple[Case, ...]) -> list[str]:
    return [f"{case.rule}-{index}" for index, case in enumerate(cases)]


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_broken_rule_is_found_at_its_node(case: Case) -> None:
    model = case.broken.model()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = [finding for finding in lint(model, case.target) if finding.rule == case.rule]
    assert case.node in [finding.node for finding in found]
    assert all(finding.reason and finding.remedy for finding in found)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_near_miss_is_left_alone(case: Case) -> None:
    assert lint(case.sound.model(), case.target) == ()


def test_every_rule_has_a_case_an_effect_and_its_evidence() -> None:
    assert {case.rule for case in CASES} == set(RULES)
    assert all(rule.effect in ("refused", "misread", "excluded") and rule.evidence for rule in RULES.values())


@pytest.mark.parametrize("target", PARSERS)
@pytest.mark.parametrize("graph", SOUND)
def test_what_the_writers_emit_passes_for_every_target(graph: Graph, target: str) -> None:
    check(graph.model(), target)


# --- What differs between the targets ----------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "newest"), [("10.3", 20), ("10.13", 22), ("10.16", 24), ("11", 24), ("rtx", 22)])
def test_newest_opset_of_each_target(target: str, newest: int) -> None:
    def rules(opset: int) -> list[str]:
        return [finding.rule for finding in lint(Graph("[r] y = Relu (x)", opset=opset).model(), target)]

    assert rules(newest) == []
    assert rules(newest + 1) == ["newer-opset"]


def test_int8_at_the_border_is_for_rtx_alone() -> None:
    graph = Graph("[d] y = DequantizeLinear (x, s, z)", inputs="int8[1, 3, 8, 8] x")
    assert {target for target in PARSERS if not lint(graph.model(), target)} == {"rtx"}


def test_missing_axis_is_sure_only_on_rtx() -> None:
    (case,) = [case for case in CASES if case.rule == "default-axis"]
    assert {target for target in PARSERS if not lint(case.broken.model(), target)} == {"rtx"}


# --- Whole graphs ------------------------------------------------------------------------------------------------


def test_all_findings_come_in_the_order_of_the_nodes() -> None:
    broken = conv(z=np.array(128, np.uint8), ws=scale(0.0, 4))
    found = [(finding.node, finding.rule) for finding in lint(broken.model(), "10.3")]
    assert found == [("q", "zero-point"), ("d", "zero-point"), ("wd", "scale-value")]


@pytest.mark.parametrize("rule", ["int32-dequantize", "activation-axis", "uint8-default"])
def test_each_place_is_said_once(rule: str) -> None:
    (case,) = [case for case in CASES if case.rule == rule]
    (found,) = lint(case.broken.model(), "rtx")
    assert (found.node, found.rule) == (case.node, rule)


def test_subgraph_and_function_are_looked_into() -> None:
    branch = "{ [inner] o = com.microsoft.Gelu (x) }"
    result = "float[1, 3, 8, 8]"
    other = "{ [other] p = Relu (x) }"
    body = f"[if] y = If (t) <then_branch = a () => ({result} o) {branch}, else_branch = e () => ({result} p) {other}>"
    graph = Graph(body, {"t": np.array(True)}, imports=MICROSOFT)
    assert [finding.node for finding in lint(graph.model(), "11")] == ["inner"]
    function = TWICE.replace("Add (a, a)", "com.microsoft.Gelu (a)").replace('"": 19', '"": 19, "com.microsoft": 1')
    graph = Graph("[f] y = local.twice (x)", imports=f', "local": 1{MICROSOFT}', functions=function)
    assert [finding.node for finding in lint(graph.model(), "11")] == ["add"]


def test_node_without_a_name_goes_by_its_output() -> None:
    (found,) = lint(Graph("y = com.microsoft.Gelu (x)", imports=MICROSOFT).model(), "11")
    assert (found.node, found.rule) == ("y", "ignored-domain")


def test_types_that_the_graph_does_not_say_are_inferred() -> None:
    graph = Graph("[k] a = Cast <to = 10> (x) " + BEHIND_RELU.replace("Relu (x)", "Relu (a)"))
    (found,) = lint(graph.model(), "10.3")
    assert found == Finding(
        "q", "scale-type", "e is FLOAT16 and its scale s is FLOAT", "store the scale in the tensor's type"
    )


def test_check_names_the_first_and_counts_all() -> None:
    check(conv().model(), "10.3")
    with pytest.raises(QuantizationError, match=r"in 1 place: wd \(scale-value\)") as raised:
        check(conv(ws=scale(0.0, 4)).model(), "10.3")
    assert raised.value.remedy
    body = " ".join(f"[g{i}] v{i} = com.microsoft.Gelu (x)" for i in range(5)) + " [r] y = Relu (x)"
    with pytest.raises(QuantizationError, match=r"in 5 places: g0 .*; g1 .*; g2 .*; and 2 more") as raised:
        check(Graph(body, imports=MICROSOFT).model(), "10.3")
    assert "g3" not in str(raised.value)


@pytest.mark.parametrize("target", ["8.6", "", "10", "RTX"])
def test_unknown_target_names_the_known_ones(target: str) -> None:
    with pytest.raises(QuantizationError, match=r"10\.3, 10\.13, 10\.16, 11, rtx"):
        lint(conv().model(), target)


# --- The real parser and builder as an independent oracle --------------------------------------------------------


@pytest.fixture(scope="module")
def trt() -> types.ModuleType:
    pytest.importorskip("tensorrt_rtx", reason="the oracle: NVIDIA's parser and a builder that needs no GPU")
    return importlib.import_module("tensorrt_rtx")


def errors_of_a_build(trt: Any, graph: Graph) -> list[str] | None:
    """What TensorRT-RTX says when it parses `graph` strongly typed and builds it for SM86; None if it builds."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.proto().SerializeToString()):
        return log.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    return log.errors if engine is None else None


RTX_CASES = tuple(case for case in CASES if case.target == "rtx")


@pytest.mark.parametrize("case", RTX_CASES, ids=names(RTX_CASES))
def test_parser_refuses_what_is_called_refused_and_builds_the_rest(case: Case, trt: types.ModuleType) -> None:
    # For "misread" and "excluded" this says that the linter is the only guard.
    errors = errors_of_a_build(trt, case.broken)
    effects = {RULES[finding.rule].effect for finding in lint(case.broken.model(), "rtx")}
    assert (errors is not None) == ("refused" in effects), errors


def distinct(graphs: list[Graph]) -> list[Graph]:
    return list({graph.proto().SerializeToString(deterministic=True): graph for graph in graphs}.values())


@pytest.mark.parametrize("graph", distinct([*SOUND, *(case.sound for case in RTX_CASES)]))
def test_what_passes_builds(graph: Graph, trt: types.ModuleType) -> None:
    assert lint(graph.model(), "rtx") == ()
    assert errors_of_a_build(trt, graph) is None


def test_uint8_is_typed_int8_by_the_parser(trt: types.ModuleType) -> None:
    log = trt.Logger(trt.Logger.ERROR)
    for graph in (conv(z=zeros(kind=np.uint8)), Graph(INT8.replace("s, z)", "s)"))):
        assert {finding.rule for finding in lint(graph.model(), "rtx")} & {"uint8-zero-point", "uint8-default"}
        inferred = onnx.shape_inference.infer_shapes(graph.proto())
        (said,) = [value.type.tensor_type.elem_type for value in inferred.graph.value_info if value.name == "i"]
        assert said == onnx.TensorProto.UINT8
        network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert trt.OnnxParser(network, log).parse(graph.proto().SerializeToString())
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        (quantize,) = [layer for layer in layers if layer.name == "q"]
        assert quantize.get_output(0).dtype == trt.int8
