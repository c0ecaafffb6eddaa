"""Small networks for the tests of the exporter, and what is asked of their graphs. The oracle is PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.export.conventions import INPUT_NAME, OUTPUT_NAME
from edgewright.export.to_onnx import export_onnx
from edgewright.runtime.errors import ExportError

__all__ = [
    "SHAPE",
    "TOLERANCE",
    "Array",
    "Net",
    "conv_net",
    "difference",
    "disturbed",
    "exported",
    "head",
    "logits_of",
    "operators",
    "refused",
    "run",
]

Array = NDArray[Any]

TOLERANCE = 1e-5  # of the largest logit
SHAPE = (3, 8, 8)


class Net(nn.Module):
    """`parts` in the order in which `function(parts, images)` uses them."""

    def __init__(self, function: Callable[[nn.ModuleList, Tensor], Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.parts, x)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def disturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, statistics and affine parameters, far from 0 and 1; evaluation mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.3, 3.0)
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                part.weight.normal_(0, 0.5)
                if part.bias is not None:
                    part.bias.normal_()
    return model.eval()


def logits_of(model: nn.Module, images: Tensor) -> Array:
    with torch.inference_mode():
        return np.asarray(model(images))


def run(content: bytes, images: Tensor) -> Array:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})[0])


def difference(content: bytes, model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> float:
    """Largest difference to PyTorch at batch sizes 3 and 2, as a share of the largest logit."""
    worst = 0.0
    for batch in (3, 2):
        images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
        expected, found = logits_of(model, images), run(content, images)
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert np.ptp(expected, 0).max() > 0.01 * np.abs(expected).max(), "the logits say nothing about the image"
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def exported(model: nn.Module, shape: tuple[int, int, int] = SHAPE, **options: Any) -> onnx.ModelProto:
    """The graph, after checking it against PyTorch."""
    content = export_onnx(model, shape, **options)
    assert difference(content, model, shape) <= TOLERANCE
    return onnx.load_from_string(content)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def refused(model: nn.Module, match: str, shape: tuple[int, int, int] = SHAPE) -> ExportError:
    with pytest.raises(ExportError, match=match) as caught:
        export_onnx(model, shape)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


def conv_net() -> nn.Module:
    """All that the tests of the graph's looks need."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU6())
    return disturbed(nn.Sequential(body, head(6)))
