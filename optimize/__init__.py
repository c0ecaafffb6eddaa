"""ONNX → ONNX: folding of batch normalization, the plan for integers, explicit Q/DQ."""
