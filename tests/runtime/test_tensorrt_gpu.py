"""TensorRT on a GPU: with a fake package that offers what a real release does, and with the real one if it is here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgewright.runtime.backends import BACKENDS, Absence, BuildRequest
from edgewright.runtime.backends import tensorrt_gpu as module
from edgewright.runtime.errors import BuildError, EngineError
from edgewright.runtime.specs import BatchProfile, PlannedLayer, TensorSpec
from tensorrt_graphs import graph, normal, planned

TENSORRT = BACKENDS["tensorrt"]
HERE = Path(__file__).parent
PLANNED = (PlannedLayer("conv", "Conv", "int8", 10), PlannedLayer("next", "Conv", "fp16", 5))
LISTINGS = {"10.3": "inspector-10.json", "11.4": "inspector-11.json"}
PLAN = b"plan of a fake"


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(Enum):
    FLOAT, HALF = range(2)


class FakeTensorRt:
    """Offers the classes of a release, notes the calls, and fails where it is told to.

    The engine that it "builds" has one input x [N, 2] and one output y [N, 2], and doubles.
    """

    def __init__(self, release: str = "10.3", faults: Mapping[str, Any] | None = None) -> None:
        self.__version__ = f"{release}.0"
        self.faults = faults or {}
        self.calls: list[Any] = []
        self.settings: dict[str, Any] = {}
        table = json.loads((HERE / f"interfaces/tensorrt-{release}.json").read_text())["classes"]

        def members(name: str) -> Any:
            return IntEnum(name, [word for word in table[name] if word not in ("name", "value")], start=0)

        for name in ("BuilderFlag", "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "MemoryPoolType"):
            setattr(self, name, members(name))
        for name in ("LayerInformationFormat", "DeviceType", "TensorIOMode"):
            setattr(self, name, members(name))
        self.DataType: Any = DataType
        fakes = (Logger, Builder, Config, Network, Parser, Profile, Cache, Runtime, Engine, Context, Inspector)
        for fake in fakes:  # or the fake would accept what the release does not
            offered = {name for name in vars(fake) if not name.startswith("_")}
            assert offered <= set(table[fake.__doc__ or ""]), (fake, offered - set(table[fake.__doc__ or ""]))
        self.ILogger = Logger
        self.Builder = lambda logger: Builder(self, logger)
        self.OnnxParser = lambda network, logger: Parser(self)
        self.Runtime = lambda logger: Runtime(self, logger)

    def say(self, logger: Any, text: str) -> None:
        logger.log(Severity.ERROR, text)


class Logger:
    "ILogger"

    Severity = Severity


class Part:
    def __init__(self, trt: FakeTensorRt, logger: Any = None) -> None:
        self._trt, self._logger = trt, logger


class Builder(Part):
    "Builder"

    def create_network(self, flags: int) -> Network:
        self._trt.calls.append(("create_network", flags))
        return Network(self._trt)

    def create_builder_config(self) -> Config:
        return Config(self._trt)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._trt)

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        self._trt.calls.append("build")
        self._trt.settings.update({key: value for key, value in vars(config).items() if not key.startswith("_")})
        if "build" in self._trt.faults:
            self._trt.say(self._logger, self._trt.faults["build"])
            return None
        return PLAN


class Config(Part):
    "IBuilderConfig"

    def set_flag(self, flag: Any) -> None:
        self._trt.calls.append(("set_flag", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self._trt.calls.append(("clear_flag", flag.name))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._trt.calls.append(("limit", pool.name, size))

    def add_optimization_profile(self, profile: Any) -> int:
        return -1 if "profile" in self._trt.faults else 0

    def create_timing_cache(self, content: bytes) -> Cache | None:
        self._trt.calls.append(("cache", content))
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache._content not in self._trt.faults.get("cache", ())


class Cache:
    "ITimingCache"

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return b"measured after " + self._content


class Network(Part):
    "INetworkDefinition"

    num_inputs = num_outputs = 1

    def get_input(self, index: int) -> Any:
        batch = self._trt.faults.get("batch", -1)
        return SimpleNamespace(name="x", shape=(batch, 2), dtype=self._trt.DataType.FLOAT)

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name="y", shape=(-1, 2), dtype=self._trt.DataType.FLOAT)


class Parser(Part):
    "OnnxParser"

    num_errors = 2

    def parse(self, content: bytes) -> bool:
        self._trt.calls.append(("parse", content))
        return "parse" not in self._trt.faults

    def get_error(self, index: int) -> Any:
        operator, text = (("Foo", "Plugin not found, are"), ("Conv", "two\nlines"))[index]
        return SimpleNamespace(desc=lambda: text, node_name=lambda: f"node{index}", node_operator=lambda: operator)


class Profile(Part):
    "IOptimizationProfile"

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self._trt.calls.append(("shape", name, least, best, most))


class Runtime(Part):
    "Runtime"

    engine_host_code_allowed = True
    DLA_core = -1  # not set

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        assert self.engine_host_code_allowed is False
        self._trt.calls.append(("load", self.DLA_core))
        if "load" in self._trt.faults or content != PLAN:
            self._trt.say(self._logger, "the engine plan file is not compatible")
            return None
        return Engine(self._trt, self._logger)


class Engine(Part):
    "ICudaEngine"

    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 2)

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType.FLOAT

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name == "x" else self._trt.TensorIOMode.OUTPUT  # type: ignore[attr-defined]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:
        assert (name, index) == ("x", 0)
        return [(2, 2), (4, 2), (8, 2)]

    def create_execution_context(self) -> Context | None:
        return None if "context" in self._trt.faults else Context(self._trt, self._logger)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self._trt)


class Context(Part):
    "IExecutionContext"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return "shape" not in self._trt.faults


class Inspector(Part):
    "EngineInspector"

    execution_context: Any = None

    def get_engine_information(self, form: Any) -> str:
        assert form.name == "JSON"
        if self.execution_context._shape != (2, 2):
            return '{"Layers": ["names", "only"]}'
        release = self._trt.__version__.removesuffix(".0")
        return (HERE / "listings" / LISTINGS[release]).read_text()


@pytest.fixture(params=["10.3", "11.4"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def using(monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRt) -> FakeTensorRt:
    monkeypatch.setattr(module, "_package", lambda: trt)
    monkeypatch.setattr(module, "PACKAGE", "json")  # installed, but without a record of its version, as JetPack's
    monkeypatch.setattr(module, "_no_device", lambda: None)
    return trt


def asked(**options: Any) -> BuildRequest:
    return BuildRequest(b"graph", "int8", (), **options)


# --- building, with the fake -------------------------------------------------------------------------------------


def test_what_is_built_is_read_from_the_inspector(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt(release))
    names = {"10.3": PLANNED, "11.4": PLANNED[:1]}[release]
    built = TENSORRT.build(BuildRequest(b"graph", "int8", names))
    assert [layer.actual for layer in built.layers] == [layer.precision for layer in names]
    assert built.compiled.engine == PLAN
    assert built.compiled.versions == {"tensorrt": f"{release}.0"}
    assert built.compiled.inputs == (TensorSpec("x", (None, 2), "float32"),)
    assert built.compiled.profile == BatchProfile()


def test_another_precision_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt())
    with pytest.raises(BuildError, match=r"next \(int8 → fp16\)"):
        TENSORRT.build(BuildRequest(b"graph", "int8", (PLANNED[0], PlannedLayer("next", "Conv", "int8", 5))))


def test_networks_are_strongly_typed(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = using(monkeypatch, FakeTensorRt(release))
    TENSORRT.compile(asked())
    strong: Any = trt.NetworkDefinitionCreationFlag  # type: ignore[attr-defined]
    assert ("create_network", 1 << strong.STRONGLY_TYPED) in trt.calls
    assert not [call for call in trt.calls if call[0] == "set_flag"]  # no FP16, no INT8
    assert ("clear_flag", "TF32") in trt.calls
    assert trt.settings["profiling_verbosity"].name == "DETAILED"


def test_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = using(monkeypatch, FakeTensorRt())
    TENSORRT.compile(asked(profile=BatchProfile(1, 2, 4), workspace=1 << 20, timing_cache=b"earlier"))
    assert trt.calls[1:] == [
        ("parse", b"graph"),
        ("shape", "x", (1, 2), (2, 2), (4, 2)),
        ("clear_flag", "TF32"),
        ("limit", "WORKSPACE", 1 << 20),
        ("cache", b"earlier"),
        "build",
        ("load", -1),
    ]


def test_the_timing_cache_goes_in_and_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt())
    assert TENSORRT.compile(asked()).timing_cache == b"measured after "
    assert TENSORRT.compile(asked(timing_cache=b"earlier")).timing_cache == b"measured after earlier"


def test_a_foreign_timing_cache_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt(faults={"cache": (b"foreign",)}))
    assert TENSORRT.compile(asked(timing_cache=b"foreign")).timing_cache == b"measured after "
    using(monkeypatch, FakeTensorRt(faults={"cache": (b"",)}))
    with pytest.raises(BuildError, match="refused an empty timing cache"):
        TENSORRT.compile(asked())


def test_a_fixed_batch_needs_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = using(monkeypatch, FakeTensorRt(faults={"batch": 4}))
    assert TENSORRT.compile(asked()).profile == BatchProfile(4, 4, 4)
    assert not [call for call in trt.calls if call[0] == "shape"]


def test_dla(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = using(monkeypatch, FakeTensorRt())
    with pytest.raises(BuildError, match="the DLA takes one batch size, given were 1 to 32; give the same"):
        TENSORRT.compile(asked(dla=1))
    assert "build" not in trt.calls
    assert TENSORRT.compile(asked(dla=1, profile=BatchProfile(4, 4, 4))).dla == 1
    assert ("load", 1) in trt.calls, "the engine is read back on the core that it is for"
    assert trt.settings["default_device_type"].name == "DLA"
    assert trt.settings["DLA_core"] == 1
    assert ("set_flag", "GPU_FALLBACK") in trt.calls


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"parse": True}, r"no importer for operator Foo \(node node0\); node node1 \(Conv\): two lines"),
        ({"build": "no tactic fits"}, r"TensorRT built no engine: no tactic fits"),
        ({"build": "workspace is too small"}, r"raise the limit of the workspace \(now none\)"),
        ({"build": "driver: (cudaError 35: insufficient)"}, r"built no engine: driver: \(cudaError 35"),
        ({"profile": True}, r"the batch sizes .* were refused"),
        (
            {"load": True},
            r"cannot read what was built: TensorRT 10.3.0 cannot load the engine: the engine plan file is",
        ),
        ({"context": True}, r"cannot read what was built: TensorRT cannot prepare the engine"),
        ({"shape": True}, r"cannot read what was built: the engine refused the shape \[2, 2\] of 'x'"),
    ],
)
def test_every_return_is_checked(faults: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt(faults=faults))
    with pytest.raises(BuildError, match=message) as caught:
        TENSORRT.compile(asked())
    assert "\n" not in str(caught.value)


# --- absence -----------------------------------------------------------------------------------------------------


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    absence = TENSORRT.absence()
    assert absence is not None
    assert absence.reason_code == "package_missing"
    assert "JetPack" in absence.hint
    assert "pip install 'edgewright[tensorrt,cuda]'" in absence.hint
    assert TENSORRT.version() == "unknown"
    with pytest.raises(EngineError, match="the package tensorrt is not installed"):
        TENSORRT.open(PLAN)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("10.3.0", True), ("10.16.2.5", True), ("11.4.1", True), ("10.2.9", False), ("8.6.2", False), ("12.0", False)],
)
def test_versions(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = using(monkeypatch, FakeTensorRt())
    trt.__version__ = version
    absence = TENSORRT.absence()
    assert (absence is None) == fits
    assert TENSORRT.version() == version
    if absence is not None:
        assert absence.reason_code == "package_missing"
        assert f"TensorRT {version} is here, needed is one from 10.3 to 11.x" in absence.reason


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, FakeTensorRt())
    missing = Absence("device_missing", "there is no GPU", "")
    monkeypatch.setattr(module, "_no_device", lambda: missing)
    assert TENSORRT.absence() == missing == TENSORRT.cannot_run()


def test_it_builds_for_no_other_gpu() -> None:
    absence = TENSORRT.unsupported("int8", "sm87")
    assert absence is not None
    assert absence.reason_code == "target_unsupported"
    assert TENSORRT.unsupported("int8", None) is None


# --- the real package --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.1)])
def test_a_real_engine_agrees_with_onnxruntime(precision: str, tolerance: float) -> None:
    absence = TENSORRT.absence()
    if absence is not None:
        pytest.skip(absence.reason)
    import onnxruntime

    images = normal("images", 9, 16, 8, 8)
    session = onnxruntime.InferenceSession(graph(precision), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": images})[0]
    built = TENSORRT.build(BuildRequest(graph(precision), precision, planned(precision)))
    with TENSORRT.open(built.compiled.engine) as runner:
        for batch in (1, 9, 2, 2, 2):  # the last is a CUDA graph
            np.testing.assert_allclose(runner.infer({"x": images[:batch]})["y"], wanted[:batch], atol=tolerance)
        runner.submit({"x": images[:4]})
        runner.submit({"x": images[4:]})
        for part in (wanted[:4], wanted[4:]):
            np.testing.assert_allclose(runner.result()["y"], part, atol=tolerance)
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no CUDA GPU here, to lend a tensor from")
        for turn in range(4):  # made in torch's stream just before
            lent = torch.from_numpy(images).cuda() * 2**turn / 2**turn
            np.testing.assert_allclose(runner.infer({"x": lent})["y"], wanted, atol=tolerance)
    with pytest.raises(EngineError, match="cannot load the engine"):
        TENSORRT.open(built.compiled.engine[:1000])
