"""One network of the line-up through the pipeline, with what has to hold for each: `zoo_network.py NAME FOLDER`.

The weights are random and seeded, batch normalization included (`export/random_weights.py`). Calibration takes seeded
noise: here it has to give ranges, not accuracy. The result is written to FOLDER/NAME.json. The tests do the same with
small images (`tests/test_zoo.py`).
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from edgewright.export.completion import Completion
from edgewright.export.models import entry_named
from edgewright.export.random_weights import is_batch_norm
from edgewright.export.resolve import resolve
from edgewright.optimize.summary import summary
from edgewright.outcome import EngineRow
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.files import write_bytes
from edgewright.workspace import StageRun

TARGET = "sm86"
BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx")
IMAGES = 8
SIDE = 320  # pixels
SEED = 4
TOLERANCE = 1e-4  # of the largest logit: folded against PyTorch, as the fold stage has it
DROP_SIDE = 240  # pixels; larger networks are looked at in this resolution, or hundreds of passes would take hours
AT_ONCE = 8  # images, each without another one of the batch normalizations
NO_FAULT = ("nothing_to_gain", "precision_unsupported")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def measured(
    name: str,
    folder: Path,
    *,
    size: int | None = None,
    backends: tuple[str, ...] = BACKENDS,
    precisions: tuple[str, ...] = (),
    model_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `make zoo` says of a network; `problems` names what does not hold.

    `size` is the side of the images in pixels, where it is to be another than the network's own.
    """
    options = Options(
        name,
        "random",
        build_dir=folder,
        calibration=_noise(folder),
        backends=backends,
        precisions=precisions,
        targets=(TARGET,),
        model_options=model_options or {},
        completion=_completion(name, size),
        rescue=False,  # random weights have no accuracy
    )
    pipeline = Pipeline(options)
    with pipeline.workspace.locked():
        rows = pipeline.built
    source = resolve(options.request)
    assert source.input_shape is not None
    module = source.module()
    folded = pipeline.workspace.path(pipeline.folded.path)
    facts = next(run.facts for run in pipeline.runs if run.name == "fold")
    totals = summary(ir.load(pipeline.workspace.path(pipeline.exported.path))).cost
    difference, largest = _difference(module, folded, source.input_shape)
    effects = list(_effects_of_dropping(module, source.input_shape))
    result = {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "macs": totals.macs,
        "input": list(source.input_shape),
        "seconds": _seconds(pipeline.runs),
        "folded": facts["folded"],
        "left": _reasons(facts["skipped"]),
        "max_abs": difference,
        "relative": difference / largest,
        "batch_norms": len(effects),
        "smallest_effect": min(effects, default=None),
        "engines": [_engine(row) for row in rows],
    }
    return {**result, "problems": list(_problems(result, folded))}


def _completion(name: str, size: int | None) -> Completion:
    if size is None:
        return Completion()
    channels = len(entry_named(name).task.preprocess.mean)
    return Completion(input_shape=(channels, size, size), resize=(size, size))


def _problems(result: dict[str, Any], folded: Path) -> Iterator[str]:
    if not result["relative"] <= TOLERANCE:  # also true for NaN
        yield f"the folded graph differs from PyTorch by {result['relative']:.1e}"
    if result["smallest_effect"] is not None and not result["smallest_effect"] > TOLERANCE:
        yield f"a dropped batch normalization changes {result['smallest_effect']:.1e} only"
    yield from (f"{name} could have been folded" for name in _foldable(folded))
    for engine in result["engines"]:
        if engine["status"] != "built_not_run" and engine["reason_code"] not in NO_FAULT:
            yield f"{engine['backend']} {engine['precision']}: {engine['reason_code']}: {engine['reason']}"


def _foldable(folded: Path) -> Iterator[str]:
    """Batch normalizations that alone read a linear operator's result; looked for apart from the fold pass."""
    graph = onnx.load(folded).graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(value for node in graph.node for value in node.input)
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            producer = producers.get(node.input[0])
            if producer is not None and producer.op_type in LINEAR and readers[node.input[0]] == 1:
                yield node.name


def _difference(module: nn.Module, folded: Path, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Largest difference between the folded graph and PyTorch, and PyTorch's largest logit."""
    images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        expected = module(images).numpy()
    session = onnxruntime.InferenceSession(folded, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def _effects_of_dropping(module: nn.Module, shape: tuple[int, int, int]) -> Iterator[float]:
    """For each batch normalization, what dropping it changes in the logits, as a share of the largest.

    One image stands in a batch several times; each place skips another normalization.
    """
    norms = [part for part in module.modules() if is_batch_norm(part)]
    size = (shape[0], min(shape[1], DROP_SIDE), min(shape[2], DROP_SIDE))
    image = torch.randn((1, *size), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        intact = module(image)
        for start in range(0, len(norms), AT_ONCE):
            chosen = norms[start : start + AT_ONCE]
            hooks = [norm.register_forward_hook(_skipping(place)) for place, norm in enumerate(chosen)]
            logits = module(image.expand(len(chosen), -1, -1, -1).contiguous())
            for hook in hooks:
                hook.remove()
            changes = (logits - intact).flatten(1).abs().amax(1) / intact.abs().max()
            yield from changes.tolist()


def _skipping(place: int) -> Any:
    def skip(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[place] = inputs[0][place]
        return output

    return skip


def _seconds(runs: list[StageRun]) -> dict[str, float]:
    """Of making the stages, by their first word."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        seconds[run.name.split()[0]] += run.seconds
    return dict(seconds)


def _reasons(skipped: list[dict[str, str]]) -> dict[str, int]:
    """How often each reason stands for what was left; names of tensors are left out of it."""
    return dict(Counter(" ".join(word for word in skip["reason"].split() if "/" not in word) for skip in skipped))


def _engine(row: EngineRow) -> dict[str, Any]:
    layers = row.info.layers if row.info else ()
    kernels = row.info.kernels if row.info else ()
    return {
        "backend": row.backend,
        "precision": row.precision,
        "status": row.status,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "bytes": row.info.bytes if row.info else 0,
        "layers": len(layers),
        "in_precision": sum(layer.actual == row.precision for layer in layers),
        "kernels": len(kernels),
    }


def _noise(folder: Path) -> Path:
    """A folder of seeded noise images; several processes may make it, each file at once and the same."""
    images = folder / "noise"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for index in range(IMAGES):
        pixels: NDArray[np.uint8] = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        write_bytes(images / f"{index}.png", content.getvalue())
    return images


if __name__ == "__main__":
    (Path(sys.argv[2]) / f"{sys.argv[1]}.json").write_text(json.dumps(measured(sys.argv[1], Path(sys.argv[2]))))
