"""What a user installs: wheel and sdist hold real files, and the base install runs without torch, onnx and scipy."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from packaging.requirements import Requirement
from PIL import Image

from edgewright.runtime import EngineInfo, Preprocess, TensorSpec
from edgewright.runtime.files import sha256_of, write_json
from toy_bundle import toy_bundle

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "export", "optimize", "runtime")
DATA = (
    "edgewright/py.typed",
    "edgewright/schemas/engine-1.schema.json",
    "edgewright/templates/report.css",
    "edgewright/templates/report.html.j2",
    "edgewright/calibration/data/fashion_mnist.npz",
    "edgewright/calibration/data/LICENSE.fashion-mnist",
    "edgewright/export/line_up.json",
    "edgewright/runtime/cuda/resize.cu",
    *(
        f"edgewright/export/zoo/weights/{name}.safetensors"
        for name in ("lenet", "lenet_bn", "lenet_bn_scratch", "mobilenet_effnet_b0")
    ),
)
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "src", *PACKAGES)
ABSENT = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors", "rich")
OLDEST_EXTRAS = ("build", "cpu", "lite")  # as in the Makefile
OFFLINE = ("connection broken", "Failed to establish a new connection", "Network is unreachable", "name resolution")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy, so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED_TO_BUILD:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return built(copy, tmp_path_factory.mktemp("dist"))


def built(source: Path, target: Path) -> Path:
    """`target`, with a wheel and an sdist of `source`: what pip calls, without its isolated environment."""
    code = f"import setuptools.build_meta as b; b.build_wheel({str(target)!r}); b.build_sdist({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return target


def the_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def source_files() -> dict[str, Path]:
    """What belongs into the package, by its path there."""
    own = ROOT / "src" / "edgewright"
    files = {f"edgewright/{path.name}": path for path in own.glob("*.py")}
    files |= {f"edgewright/learned/{path.name}": path for path in (own / "learned").glob("*.py")}
    for package in PACKAGES:
        files |= {f"edgewright/{path.relative_to(ROOT).as_posix()}": path for path in (ROOT / package).rglob("*.py")}
    return files | {name: own / name.removeprefix("edgewright/") for name in DATA}


def test_wheel_holds_the_real_files(dist: Path) -> None:
    with zipfile.ZipFile(the_file(dist, "*.whl")) as wheel:
        packed = {entry.filename: entry for entry in wheel.infolist()}
        assert not [name for name, entry in packed.items() if stat.S_ISLNK(entry.external_attr >> 16)]
        for name, path in source_files().items():
            assert wheel.read(name) == path.read_bytes(), name


def test_wheel_holds_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(the_file(dist, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        notices = {Path(name).name for name in wheel.namelist() if ".dist-info/licenses/" in name}
    assert names == {*source_files()}
    assert notices == {"LICENSE", "NOTICE", "LICENSE.fashion-mnist"}


def test_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(the_file(dist, "*.tar.gz")) as sdist:
        assert not [member.name for member in sdist if member.issym() or member.islnk()]
        for member in sdist:  # extractall's filters are newer than Python 3.10
            if member.isfile():
                target = tmp_path / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = sdist.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    (tmp_path / "again").mkdir()
    again = built(the_file(tmp_path, "edgewright-*"), tmp_path / "again")
    with zipfile.ZipFile(the_file(dist, "*.whl")) as first, zipfile.ZipFile(the_file(again, "*.whl")) as second:
        assert {entry.filename: entry.CRC for entry in first.infolist() if "RECORD" not in entry.filename} == {
            entry.filename: entry.CRC for entry in second.infolist() if "RECORD" not in entry.filename
        }


def test_runtime_imports_relatively_so_that_the_folder_can_be_copied() -> None:
    absolute = []
    for path in (ROOT / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            absolute += [f"{path}: {name}" for name in names if name.split(".")[0] == "edgewright"]
    assert not absolute


def test_runtime_imports_neither_torch_nor_onnx_where_they_are_installed() -> None:
    code = "import sys, edgewright.runtime; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {*ABSENT, "onnxruntime"} & {*loaded}
    assert {"numpy", "PIL", "edgewright"} <= {*loaded}


def test_oldest_versions_are_the_lower_bounds(dist: Path) -> None:
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    oldest = {line.partition("#")[0].strip() for line in lines} - {""}
    with zipfile.ZipFile(the_file(dist, "*.whl")) as wheel:
        (file,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        headers = Parser().parsestr(wheel.read(file).decode())
    requirements = [Requirement(text) for text in headers.get_all("Requires-Dist", [])]
    for requirement in requirements:
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in OLDEST_EXTRAS):
            (bound,) = (spec for spec in requirement.specifier if spec.operator == ">=")
            assert f"{requirement.name}=={bound.version}" in oldest


@dataclass(frozen=True)
class Environment:
    """A virtual environment into which the wheel was installed from the index, as a user would."""

    folder: Path

    def run(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment somewhere else than in the checkout."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.folder / "bin" / command, *arguments],
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


def installed(wheel: Path, extra: str, folder: Path) -> Environment:
    """An environment with `wheel[extra]`; what it needs comes in the versions that are here, which pip has cached."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder)]
    constraints = folder / "constraints.txt"
    present = {distribution.name: distribution.version for distribution in metadata.distributions()}
    present.pop("edgewright")
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in present.items()))
    install = ["install", "--quiet", "--retries", "1", "--constraint", str(constraints), f"{wheel}{extra}"]
    result = subprocess.run([*pip, *install], capture_output=True, text=True)
    if any(words in result.stderr for words in OFFLINE):
        pytest.skip(f"the package index cannot be reached: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    return Environment(folder)


@pytest.fixture(scope="module")
def base(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return installed(the_file(dist, "*.whl"), "", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def device(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return installed(the_file(dist, "*.whl"), "[cpu]", tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose logits are the mean of each colour: it can tell red, green and blue images."""
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["logits"]),
        ],
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    folder = tmp_path_factory.mktemp("engine")
    (folder / "colours.onnx").write_bytes(content)
    info = EngineInfo(
        backend="onnxruntime",
        precision="fp32",
        target=None,
        inputs=(TensorSpec("images", (None, 3, 4, 4), "float32"),),
        outputs=(TensorSpec("logits", (None, 3), "float32"),),
        preprocess=Preprocess(resize=(4, 4), crop=None, mean=(0.5,) * 3, std=(0.1,) * 3),
        labels=("red", "green", "blue"),
        onnx_sha256=sha256_of(content),
        engine_sha256=sha256_of(content),
        bytes=len(content),
        layers=(),
    )
    write_json(folder / "colours.json", info.to_json())
    return folder / "colours.onnx"


@pytest.fixture(scope="module")
def green(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "green.png"
    Image.fromarray(np.full((6, 8, 3), (10, 240, 10), np.uint8)).save(path)
    return path


def test_base_install_brings_none_of_the_build_packages(base: Environment) -> None:
    code = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    assert base.run("python", "-c", code).stdout.strip() == "[]"


def test_base_install_imports_the_runtime(base: Environment) -> None:
    result = base.run("python", "-W", "error", "-c", "import edgewright.runtime as r; print(r.Session, r.__file__)")
    assert result.returncode == 0, result.stderr
    assert str(base.folder) in result.stdout


def test_base_install_has_the_command(base: Environment) -> None:
    result = base.run("edgewright", "--help")
    assert result.returncode == 0, result.stderr
    assert "engine" in result.stdout
    assert base.run("edgewright", "--version").stdout.strip().endswith(metadata.version("edgewright"))


def test_base_install_lists_the_models(base: Environment) -> None:
    result = base.run("edgewright", "models")
    assert (result.returncode, "mobilenet_effnet_b0" in result.stdout) == (0, True), result.stderr
    result = base.run("edgewright", "models", "--json")
    assert result.returncode == 0, result.stderr
    assert {"mobilenet_effnet_b0", "efficientnet_lite0"} <= {
        model["name"] for model in json.loads(result.stdout)["models"]
    }


@pytest.mark.parametrize("command", ["engine", "export", "calibrate", "train"])
def test_base_install_says_what_a_workstation_command_lacks(base: Environment, command: str) -> None:
    result = base.run("edgewright", command)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: \w+ is not installed here; pip install 'edgewright\[build,cpu\]'\n", result.stderr)


def test_base_install_audits_an_engine(base: Environment, engine: Path) -> None:
    result = base.run("edgewright", "audit", engine, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["schema"] == "edgewright.audit/1"
    plain = base.run("edgewright", "audit", engine)
    assert plain.returncode == 1
    assert plain.stderr == "error: rich is not installed here; pip install 'edgewright[build,cpu]'\n"


def test_base_install_says_that_a_backend_is_missing(base: Environment, engine: Path, green: Path) -> None:
    result = base.run("edgewright", "run", "--engine", engine, green)
    assert result.returncode == 1
    assert result.stderr == "error: the package onnxruntime is not installed; pip install 'edgewright[cpu]'\n"


def test_device_install_runs_an_engine(device: Environment, engine: Path, green: Path) -> None:
    result = device.run("edgewright", "run", "--json", "--engine", engine, green)
    assert result.returncode == 0, result.stderr
    (image,) = json.loads(result.stdout)["images"]
    assert [prediction["label"] for prediction in image["top"]] == ["green", "red", "blue"]
    assert image["top"][0]["probability"] > 0.99


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("bundle") / "toy.bundle")


def test_device_install_builds_verifies_and_runs_a_bundle(
    device: Environment, bundle: Path, green: Path, tmp_path: Path
) -> None:
    built = device.run("edgewright", "build", bundle, "--cache", tmp_path / "cache", "--json")
    assert built.returncode == 0, built.stderr
    rows = [(row["backend"], row["status"]) for row in json.loads(built.stdout)["engines"]]
    assert rows[0] == ("onnxruntime", "verified")
    assert {status for _, status in rows[1:]} == {"skipped"}
    verified = device.run("edgewright", "verify", bundle, "--cache", tmp_path / "cache")
    assert verified.returncode == 0, verified.stderr
    ran = device.run("edgewright", "run", green, "--engine", bundle, "--cache", tmp_path / "cache", "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["images"][0]["top"]) == 4
    assert "proven here" in ran.stderr


def test_device_install_measures_a_bundle(device: Environment, bundle: Path, engine: Path, tmp_path: Path) -> None:
    done = device.run("edgewright", "bench", bundle, "--cache", tmp_path / "cache", "--preprocess", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert "Engine: onnxruntime fp32" in done.stdout
    done = device.run("edgewright", "bench", engine, "--seconds", "0", "--json")
    assert json.loads(done.stdout)["results"][0]["latency_ms"]["runs"] >= 10, done.stderr


def test_base_install_says_what_a_device_lacks(base: Environment, bundle: Path, tmp_path: Path) -> None:
    built = base.run("edgewright", "build", bundle, "--cache", tmp_path / "cache", "--json")
    assert built.returncode == 3, built.stderr
    assert {row["status"] for row in json.loads(built.stdout)["engines"]} == {"skipped"}
    examined = base.run("edgewright", "doctor", "--json")
    assert examined.returncode == 0, examined.stderr
    states = {state["backend"]: state for state in json.loads(examined.stdout)["backends"]}
    assert not any(state["ready"] for state in states.values())
    assert states["onnxruntime"]["remedy"] == "pip install 'edgewright[cpu]'"


def test_device_install_brings_none_of_the_build_packages(device: Environment) -> None:
    code = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    assert device.run("python", "-c", code).stdout.strip() == "[]"
