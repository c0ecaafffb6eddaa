"""What the device pays for Edgewright beyond numpy and onnxruntime: import, calls, memory, opening a bundle, disk."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from figures import ROOT, Figure, run_python, sample_folder
from onnx import TensorProto, helper

from edgewright.runtime.backends import backend_named
from edgewright.runtime.backends.runner import Runner
from edgewright.runtime.latency import interleaved_samples, paired_ratio
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.session import Session
from edgewright.runtime.specs import EngineInfo

ROUNDS = 9
MODEL = "efficientnet_lite0"
IMPORT = """
import time
import numpy
began = time.perf_counter()
import edgewright.runtime
print(time.perf_counter() - began)
import sys
assert not {"torch", "onnx", "onnxruntime", "scipy", "rich", "cryptography"} & sys.modules.keys()
"""
RESIDENT = """
from pathlib import Path
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1])
"""
BARE = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = np.zeros((1, 3, 224, 224), np.float32)
for _ in range(20):
    session.run(None, {session.get_inputs()[0].name: image})
"""
OURS = """
import sys
import numpy as np
from edgewright.runtime import Session
session = Session.open(sys.argv[1], threads=1)
image = np.zeros((1, 3, 224, 224), np.float32)
for _ in range(20):
    session.infer(image)
"""
TIMED = """
import time
{imports}
began = time.perf_counter()
{opening}
print(time.perf_counter() - began)
"""
OPEN_BARE = (
    "import numpy, onnxruntime, sys",
    'onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])',
)
OPEN_OURS = (
    "import numpy, onnxruntime, sys\nfrom edgewright.runtime import Session",
    "Session.open(sys.argv[1], backend='onnxruntime')",
)


def measure() -> Iterator[Figure]:
    """Each figure of the runtime."""
    yield _import()
    yield _overhead()
    bundle = _packed()
    if bundle is not None:
        (engine,) = (bundle / "engines").glob("*.onnx")
        yield _memory(engine, bundle)
        yield _opening(engine, bundle)
    yield _base_install()


def _import() -> Figure:
    seconds = statistics.median(float(run_python(IMPORT)) for _ in range(ROUNDS))
    return Figure("import edgewright.runtime, beyond numpy", seconds, "s", bound=0.15)


def _overhead() -> Figure:
    """Of one call, on a graph that does next to nothing, in rounds with the bare session."""
    runner = backend_named("onnxruntime").open(_tiny_graph(), threads=1)
    session = Session(runner, _info(runner), "measured")
    bare = runner._session  # type: ignore[attr-defined]  # the same session, without what is around it
    image = np.zeros((1, 3, 8, 8), np.float32)
    samples = interleaved_samples(
        {"bare": lambda: bare.run(None, {"image": image}), "ours": lambda: session.infer(image)},
        budget_seconds=5.0,
        min_runs=2000,
        max_runs=20000,
    )
    difference = 1000 * float(np.median(samples["ours"] - samples["bare"]))
    ratio = paired_ratio(samples["ours"], samples["bare"])
    note = f"{1000 * float(np.median(samples['bare'])):.1f} µs bare, ratio {ratio.median:.2f}"
    return Figure("Session.infer, beyond InferenceSession.run", difference, "µs", bound=25.0, note=note)


def _tiny_graph() -> bytes:
    """ReLU of one image of 3 × 8 × 8."""
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 8]) for name in ("image", "rectified")
    ]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["rectified"])], "tiny", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    content: bytes = model.SerializeToString()
    onnx.checker.check_model(model)
    return content


def _info(runner: Runner) -> EngineInfo:
    return EngineInfo(
        backend="onnxruntime",
        precision="fp32",
        target=None,
        inputs=runner.inputs,
        outputs=runner.outputs,
        preprocess=Preprocess((8, 8), None, (0.5,) * 3, (0.25,) * 3),
        labels=(),
        onnx_sha256="",
        engine_sha256="",
        bytes=0,
        layers=(),
    )


def _memory(engine: Path, bundle: Path) -> Figure:
    bare = [float(run_python(BARE + RESIDENT, str(engine))) / 1024 for _ in range(3)]
    ours = [float(run_python(OURS + RESIDENT, str(bundle))) / 1024 for _ in range(3)]
    note = f"{statistics.median(bare):.0f} MiB bare, {MODEL}"
    beyond = statistics.median(ours) - statistics.median(bare)
    return Figure("resident memory, beyond onnxruntime alone", beyond * 1.048576, "MB", bound=15.0, note=note)


def _opening(engine: Path, bundle: Path) -> Figure:
    bare, ours = [], []
    for _ in range(ROUNDS):
        bare.append(_seconds(OPEN_BARE, engine))
        ours.append(_seconds(OPEN_OURS, bundle))
    beyond = statistics.median(ours) - statistics.median(bare)
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e6
    note = f"{statistics.median(bare):.2f} s bare; the bundle has {size:.0f} MB"
    return Figure(f"opening a verified bundle of {MODEL}, beyond the bare session", beyond, "s", bound=0.5, note=note)


def _seconds(code: tuple[str, str], path: Path) -> float:
    imports, opening = code
    return float(run_python(TIMED.format(imports=imports, opening=opening), str(path)))


def _packed() -> Path | None:
    """A bundle of EfficientNet-Lite0, calibrated on some of the photographs and judged on others; None without them."""
    folder = sample_folder()
    if folder is None:
        return None
    build = ROOT / "build"
    half = _halves(folder, build / "sample-halves")
    command = [
        *(str(Path(sys.executable).with_name("edgewright")), "pack", MODEL, "--build-dir", str(build)),
        *("--calibration", str(half / "calibration"), "--evaluation", str(half / "evaluation")),
        *("--backend", "onnxruntime", "--max-drop", "5"),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return build / MODEL / f"{MODEL}.bundle"


def _halves(folder: Path, target: Path) -> Path:
    """Links to the photographs, every second one to calibrate with, the others with their labels."""
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for name, chosen in (("calibration", rows[::2]), ("evaluation", rows[1::2])):
        (target / name).mkdir(parents=True, exist_ok=True)
        for row in chosen:
            link = target / name / row["file"]
            if not link.exists():
                link.symlink_to(folder / row["file"])
    lines = ["file,index", *(f"{row['file']},{row['index']}" for row in rows[1::2])]
    (target / "evaluation" / "labels.csv").write_text("\n".join(lines) + "\n")
    return target


def _base_install() -> Figure:
    """Site-packages of a fresh environment with the wheel and what it asks for, without numpy, pip and setuptools."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = folder / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        copy = folder / "edgewright"  # pip would build in the checkout
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        subprocess.run([*install, str(copy)], check=True, capture_output=True, cwd=folder)
        (packages,) = environment.glob("lib/python*/site-packages")
        others = ("numpy", "pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")
        sizes = {path.name: _bytes(path) for path in packages.iterdir() if not path.name.startswith(others)}
    note = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:4])
    return Figure("base install on disk, beside numpy", sum(sizes.values()) / 1e6, "MB", bound=40.0, note=note)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(os.lstat(file).st_size for file in files if file.is_file())
