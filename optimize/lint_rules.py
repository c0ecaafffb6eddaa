"""The rules of the linter, each with its evidence, and what each version of NVIDIA's ONNX parser documents.

"RTX" is what TensorRT-RTX 1.7.1 said when it parsed such a graph or built it for SM86; "10.1 source" is onnx-tensorrt,
branch 10.1-GA, the newest public source nearest to JetPack's 10.3.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARSERS", "RULES", "ParserRules", "Rule"]


@dataclass(frozen=True)
class Rule:
    """What TensorRT does where the rule is broken ("refused", "misread" or "excluded"), and how that is known."""

    effect: str
    evidence: str


@dataclass(frozen=True)
class ParserRules:
    """What one version of TensorRT's ONNX parser reads.

    * newest_opset: the newest opset of ONNX that it documents; source: where
    * default_axis: how it reads a Q/DQ without `axis` (ONNX: 1), None if that is not known
    * stray_int8: whether INT8 tensors may come from elsewhere than Q, and go elsewhere than DQ
    * free_scale_type: whether from opset 23 on the scale's type may differ from the tensor's, as ONNX then allows
    """

    newest_opset: int
    source: str
    default_axis: int | None
    stray_int8: bool
    free_scale_type: bool


PARSERS: dict[str, ParserRules] = {
    # operators.md of 10.0 and 10.1: "opset 9 to opset 20"; that of 10.3 was not at hand. Its importer takes a missing
    # axis for the tensor's rank, and that for 0 (10.1 source, QuantDequantLinearHelper).
    "10.3": ParserRules(20, "operators.md of onnx-tensorrt 10.1", 0, False, False),
    # operators.md said 9 to 22 between 10.8 and 10.13 (third-party copy); that of 10.13 was not at hand: conservative.
    "10.13": ParserRules(22, "a copy of operators.md from before 10.13", None, False, False),
    # operators.md of 10.15: "opset 9 to opset 24"; that of 10.16 was not at hand.
    "10.16": ParserRules(24, "operators.md of onnx-tensorrt 10.15", None, False, False),
    # The notes of 11.5: "Added support for ONNX opset 25"; so 24 is what all of 11.x read.
    "11": ParserRules(24, "the release notes of TensorRT 11.5, which add 25", None, False, False),
    # TensorRT-RTX, ONNX Conversion and Deployment: "opsets 9 to 22 (inclusive)". 1.7.1 reads newer ones without a word.
    "rtx": ParserRules(22, "the ONNX conversion guide of TensorRT-RTX", 1, True, True),
}

RULES: dict[str, Rule] = {
    # --- The graph
    "newer-opset": Rule("excluded", "PARSERS; RTX reads a graph of opset 27 without a warning, by what it knows"),
    "custom-operator": Rule("refused", 'RTX: "Plugin not found, are the plugin name, version, and namespace correct?"'),
    "ignored-domain": Rule("misread", "RTX builds com.microsoft.Gelu and .QuantizeLinear by their names alone"),
    "integer-operator": Rule(
        "refused", 'RTX: "In function checkQLinearConv: [8] false", likewise for the others; operators.md: N'
    ),
    "float64": Rule(
        "misread", 'operators.md: "TensorRT will attempt to cast DOUBLE down to FLOAT"; RTX types the layers FLOAT'
    ),
    "uint8-tensor": Rule("refused", 'RTX: "TensorRT does not support UINT8 types for intermediate tensors"'),
    "mixed-types": Rule("refused", 'RTX: "IConvolutionLayer `input` and `kernel` must be of same type"'),
    # --- Integers
    "int32-dequantize": Rule(
        "refused", 'RTX: "input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8"'
    ),
    "quantized-type": Rule(
        "refused",
        'RTX: "TensorRT only allows FP8, INT8, INT4, and FP4 quantization", "unsupported input type of UINT8"',
    ),
    "int8-constant": Rule("refused", 'RTX: "Quantized constant (w) is only allowed before DQ or PLUGIN_V2"'),
    "stray-int8": Rule(
        "excluded", "operators.md of 10.0: INT8 only through quantization, no operator but DQ reads it; RTX takes more"
    ),
    "quantized-bias": Rule("excluded", "ModelOpt quantizes no bias; RTX takes INT8, and refuses the usual INT32"),
    # --- Zero-points
    "zero-point": Rule(
        "refused", 'RTX: "Non-zero zero point is not supported", "`zero_point` which is not an initializer"'
    ),
    "zero-point-shape": Rule("refused", 'RTX: "The scale and zero point must have the same volume"'),
    "uint8-zero-point": Rule(
        "misread", 'RTX warns "UINT8 zero_point only on DLA (version >= 3.16). Defaulting to INT8 instead" and builds'
    ),
    "uint8-default": Rule(
        "misread", 'RTX builds, silently; 10.1 source: "ONNX default is UINT8, TRT will default to INT8"'
    ),
    # --- Scales
    "scale-constant": Rule(
        "excluded",
        "IQuantizeLayer: scale must be a build-time constant; RTX's builder crashes on another before a Conv",
    ),
    "scale-value": Rule("refused", 'RTX: "Scale coefficients must all be positive"'),
    "scale-range": Rule("excluded", "RTX builds; infinity, or 1 / scale beyond FP32, leaves no value of the tensor"),
    "scale-type": Rule("excluded", "ONNX QuantizeLinear before opset 23: scale and tensor share the type T1"),
    "scale-shape": Rule("refused", 'RTX: "ScaleMode is illegal", "only the quantization axis may be blocked"'),
    "scale-length": Rule("refused", 'RTX: "The number of scales is not equal to the number of output channels"'),
    "scale-opset": Rule(
        "excluded", "ONNX QuantizeLinear: `axis` since opset 13, FP16 since 19; RTX takes them earlier"
    ),
    "activation-axis": Rule("excluded", "NVIDIA: activations per tensor, only weights per channel; RTX builds"),
    "weight-axis": Rule("excluded", "NVIDIA: weights per output channel; a scale inside the sum stays out of INT8"),
    "default-axis": Rule("misread", "10.1 source: a Q/DQ without axis gets axis 0, ONNX says 1; RTX reads 1"),
    "block-axis": Rule("refused", 'RTX: "The blocking dimension must be the last or second to last dimension"'),
}
