"""Peak memory of calibration on 64 and on 512 images, each in a process of its own, streamed from files.

The peak is Linux's VmHWM; `ru_maxrss` of a child would start at what its parent had when it was forked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure, run_python
from PIL import Image
from quantizers import folded_model

CODE = """
import sys
from pathlib import Path
import onnx_ir as ir
from edgewright.calibration.collect import batch_size, collect
from edgewright.calibration.datasets import image_folder
from edgewright.calibration.stream import batches
from edgewright.export.models import MODELS
images = image_folder(Path(sys.argv[2]))
preprocess = MODELS["efficientnet_lite0"].task.preprocess
model = ir.load(sys.argv[1])
table = collect(model, batches(images, preprocess, batch_size(model)), identity={})
assert table.samples == len(images)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


def measure() -> Iterator[Figure]:
    """The ratio of the two peaks, and the smaller one in MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph = folder / "folded.onnx"
        graph.write_bytes(ir.to_proto(folded_model("efficientnet_lite0")).SerializeToString())
        peaks = {}
        for count in (64, 512):
            _write_images(folder / str(count), count)
            peaks[count] = float(run_python(CODE, str(graph), str(folder / str(count)))) / 1024
    yield Figure("peak memory of calibration, 64 images", peaks[64], "MiB")
    yield Figure("peak memory, 512 images as a share of that", peaks[512] / peaks[64], "", bound=1.05)


def _write_images(folder: Path, count: int) -> None:
    """Smooth random pictures of 320 × 280 pixels; what they show has no influence on memory."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8))
        coarse.resize((320, 280), Image.Resampling.BICUBIC).save(folder / f"{index:04}.jpg")
