"""Every TensorRT attribute that our sources look up, held against the interfaces of five real releases.

TensorRT is not installed where these tests run, and a mock would accept any spelling. `interfaces/` has what the
bindings of each release really offer: the public names of each class, read from the imported module.

The sources are read, not run. An attribute is known to be TensorRT's if it hangs on the module, which must be called
`trt`, or on a class (`trt.BuilderFlag.TF32`, `getattr(trt, "ComputeCapability", None)`). On anything else (`config.x`)
only the name `x` is known, and it is taken for TensorRT's if any TensorRT class has it. When a test fails:

* "not in USED": add the attribute to `USED`, or to `ORDINARY` if the object was not TensorRT's
* "is not in": some release lacks it; add it to `GUARDED`, and ask `hasattr` or a `getattr` with a default in that file
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[2] / "runtime"
GLOBS = ("backends/*tensorrt*.py", "backends/nvidia*.py", "cuda/*.py")
INTERFACES = sorted((Path(__file__).parent / "interfaces").glob("*.json"))
MODULE = "tensorrt"  # the module itself, in the tables of classes
MODULE_WORDS = {"trt", "_trt", "tensorrt", "tensorrt_rtx"}

USED: dict[str, tuple[str, ...]] = {
    MODULE: (
        "Builder",
        "BuilderFlag",
        "ComputeCapability",
        "CudaGraphStrategy",
        "DataType",
        "DeviceType",
        "ILogger",
        "LayerInformationFormat",
        "MemoryPoolType",
        "NetworkDefinitionCreationFlag",
        "OnnxParser",
        "ProfilingVerbosity",
        "Runtime",
        "TensorIOMode",
    ),
    "Builder": (
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ),
    "BuilderFlag": ("GPU_FALLBACK", "TF32"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
    "DataType": ("FLOAT",),
    "DeviceType": ("DLA",),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "IBuilderConfig": (
        "DLA_core",
        "add_optimization_profile",
        "clear_flag",
        "create_timing_cache",
        "default_device_type",
        "num_compute_capabilities",
        "profiling_verbosity",
        "set_compute_capability",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    ),
    "ICudaEngine": (
        "create_engine_inspector",
        "create_execution_context",
        "create_runtime_config",
        "get_tensor_dtype",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "num_io_tensors",
    ),
    "IExecutionContext": ("execute_async_v3", "get_tensor_shape", "set_input_shape", "set_tensor_address"),
    "ILogger": ("Severity", "log"),
    "ILogger.Severity": ("ERROR", "INTERNAL_ERROR", "VERBOSE"),
    "ILayer": ("get_output",),
    "INetworkDefinition": (
        "add_identity",
        "add_input",
        "get_input",
        "get_output",
        "mark_output",
        "num_inputs",
        "num_outputs",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": ("create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("serialize",),
    "LayerInformationFormat": ("JSON",),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "ProfilingVerbosity": ("DETAILED",),
    "Runtime": ("DLA_core", "deserialize_cuda_engine", "engine_host_code_allowed"),
    "TensorIOMode": ("INPUT",),
}


@dataclass(frozen=True)
class Guard:
    """The releases that lack an attribute, and what our sources ask for instead of it (None: the attribute itself)."""

    lacking: tuple[str, ...]
    by: str | None = None


RTX_ONLY = ("10.3", "10.13", "10.16", "11.4")
GUARDED: dict[str, Guard] = {
    "tensorrt.ComputeCapability": Guard(RTX_ONLY),
    "IBuilderConfig.num_compute_capabilities": Guard(RTX_ONLY, by="ComputeCapability"),
    "IBuilderConfig.set_compute_capability": Guard(RTX_ONLY, by="ComputeCapability"),
    # all in a file of TensorRT-RTX's only, which asks whether it captures CUDA graphs itself
    "tensorrt.CudaGraphStrategy": Guard(RTX_ONLY),
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE": Guard(RTX_ONLY),
    "ICudaEngine.create_runtime_config": Guard(("10.3",)),
    "IRuntimeCache.deserialize": Guard(RTX_ONLY),
    "IRuntimeCache.serialize": Guard(RTX_ONLY, by="ComputeCapability"),  # a timing cache has it everywhere
    "IRuntimeConfig.create_runtime_cache": Guard(RTX_ONLY),
    "IRuntimeConfig.cuda_graph_strategy": Guard(RTX_ONLY),
    "IRuntimeConfig.set_runtime_cache": Guard(RTX_ONLY),
}

# Names that TensorRT has too, but that our sources look up on other objects: lists, arrays, our own dataclasses.
ORDINARY = {
    *("append", "clear", "count", "extend", "format", "insert", "max", "min", "pop", "remove", "update"),
    *("data", "itemsize", "kind", "nbytes", "size", "strides"),
    *("engine", "message", "precision"),
    *("allocate", "code", "enqueue", "kernel", "release", "start", "value", "write"),
}

# Gone from a class in 11 while another class of 11 still has the name, so that the name alone does not tell; taken for
# gone wherever it stands. (INT8, FP8, … are left out: they are data types too.)
GONE_BUT_ELSEWHERE = {"has_implicit_batch_dimension"}


# --- the tables --------------------------------------------------------------------------------------------------


def table(path: Path) -> dict[str, frozenset[str]]:
    content = json.loads(path.read_text())
    return {name: frozenset(members) for name, members in {**content["classes"], MODULE: content["names"]}.items()}


TABLES = {path.stem.removeprefix("tensorrt-"): table(path) for path in INTERFACES}
CLASSES = {name for classes in TABLES.values() for name in classes}
# What is looked up on an object is no dtype of the module (np.float32), but may be one of its classes.
NAMES = {
    member
    for classes in TABLES.values()
    for name, members in classes.items()
    for member in members
    if name != MODULE or member in classes
}
OLD = [classes for version, classes in TABLES.items() if version.startswith("10.")]
NEW = [classes for version, classes in TABLES.items() if version.startswith("11.")]
REMOVED = {
    (owner, member)
    for classes in OLD
    for owner, members in classes.items()
    for member in members
    if not any(member in new.get(owner, ()) for new in NEW)
}
GONE = {
    member for _, member in REMOVED if not any(member in members for new in NEW for members in new.values())
} | GONE_BUT_ELSEWHERE


def lacking(owner: str, member: str) -> tuple[str, ...]:
    return tuple(version for version, classes in TABLES.items() if member not in classes.get(owner, ()))


# --- the sources -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One attribute looked up; `owner` is the class, or the module, if it can be told."""

    where: str
    owner: str | None
    member: str
    stored: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.owner or '?'}.{self.member}"


@dataclass(frozen=True)
class Source:
    """`guards`: what is asked for by hasattr, or by getattr with a default; `strings`: text and where it stands."""

    file: str
    uses: tuple[Use, ...]
    guards: frozenset[str]
    strings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, file: str, text: str) -> Source:
        tree = ast.parse(text)
        modules, foreign = imported(tree)
        uses: list[Use] = []
        guards: set[str] = set()
        strings: list[tuple[str, str]] = []

        def note(node: ast.expr, target: ast.expr, member: str, stored: bool = False) -> None:
            owner, chain = owner_of(target, modules), dotted(target)
            ours = chain in (("self",), ("cls",)) or (bool(chain) and chain[0] in foreign)
            if not member.startswith("_") and (owner is not None or not ours):
                uses.append(Use(f"{file}:{node.lineno}", owner, member, stored))

        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=target, attr=member, ctx=context):
                    note(node, target, member, isinstance(context, ast.Store))
                case ast.Call(
                    func=ast.Name(id="hasattr" | "getattr" | "setattr" as function),
                    args=[target, ast.Constant(value=str(member)), *rest],
                ):
                    note(node, target, member, function == "setattr")
                    if function == "hasattr" or (function == "getattr" and rest):
                        guards.add(member)
                case ast.ImportFrom(module="tensorrt" | "tensorrt_rtx", names=names):
                    uses += [Use(f"{file}:{node.lineno}", MODULE, alias.name) for alias in names]
                case ast.ClassDef(bases=bases, body=body):
                    uses += [Use(f"{file}:{line}", *pair) for line, pair in overrides(bases, body, modules)]
                case ast.Constant(value=str(value)):
                    strings.append((value, f"{file}:{node.lineno}"))
        return cls(file, tuple(uses), frozenset(guards), tuple(strings))

    def releases(self) -> set[str]:
        """Those that the file meets: a file of TensorRT-RTX's only that."""
        return {version for version in TABLES if version.startswith("rtx") or "rtx" not in self.file}

    def users_of(self, owner: str, member: str) -> list[Use]:
        return [use for use in self.uses if use.member == member and use.owner in (owner, None)]


def imported(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names that stand for TensorRT, and those that an absolute import bound to something else."""
    modules, foreign = set(MODULE_WORDS), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                (modules if alias.name in MODULE_WORDS else foreign).add(bound)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module not in MODULE_WORDS:
            foreign |= {alias.asname or alias.name for alias in node.names}
    return modules, foreign


def dotted(node: ast.expr) -> tuple[str, ...]:
    """`a.b.c` as ("a", "b", "c"); of `f().b.c` nothing, as nothing is known about its beginning."""
    if isinstance(node, ast.Name):
        return (node.id,)
    start = dotted(node.value) if isinstance(node, ast.Attribute) else ()
    return (*start, node.attr) if start and isinstance(node, ast.Attribute) else ()


def owner_of(target: ast.expr, modules: set[str]) -> str | None:
    """`trt` is the module, `trt.BuilderFlag` and `self._trt.BuilderFlag` are the class; None for any other object."""
    chain = dotted(target)
    if chain and chain[-1] in modules:
        return MODULE
    ends = (".".join(chain[start:]) for start in range(len(chain)))
    return next((end for end in ends if end in CLASSES), None)


def overrides(bases: list[ast.expr], body: list[ast.stmt], modules: set[str]) -> Iterator[tuple[int, tuple[str, str]]]:
    """The methods of a TensorRT class that a class of ours replaces."""
    for owner in filter(None, (owner_of(base, modules) for base in bases)):
        members = {member for classes in TABLES.values() for member in classes.get(owner, ())}
        for item in body:
            if isinstance(item, ast.FunctionDef) and item.name in members:
                yield item.lineno, (owner, item.name)


# --- the checks --------------------------------------------------------------------------------------------------


def undeclared(source: Source) -> list[str]:
    declared = {member for members in USED.values() for member in members}
    found = []
    for use in source.uses:
        if use.owner is not None:
            known = use.member in USED.get(use.owner, ())
        else:
            known = use.member not in NAMES or use.member in declared | ORDINARY
        if not known:
            found.append(f"{use}: not in USED" + ("" if use.owner else ", nor in ORDINARY"))
    return found


def unguarded(source: Source) -> list[str]:
    found = []
    for key, guard in GUARDED.items():
        owner, _, member = key.rpartition(".")
        missing = [version for version in guard.lacking if version in source.releases()]
        if missing and (guard.by or member) not in source.guards:
            asked = guard.by or member
            found += [
                f'{use}: missing in {", ".join(missing)}, and {source.file} never asks hasattr(…, "{asked}")'
                for use in source.users_of(owner, member)
            ]
    return found


def removed_in_11(source: Source) -> list[str]:
    found = []
    for use in source.uses:
        by_name = use.owner is None and use.member in GONE and (use.stored or use.member not in ORDINARY)
        if by_name or (use.owner, use.member) in REMOVED:
            found.append(f"{use}: removed in TensorRT 11")
    found += [
        f"{where}: the string {text!r} names what TensorRT 11 removed"
        for text, where in source.strings
        if text in GONE - ORDINARY
    ]
    return found


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = sorted(path for pattern in GLOBS for path in RUNTIME.glob(pattern))
    if not paths:
        assert ".tensorrt" not in (RUNTIME / "backends/__init__.py").read_text(), f"nothing found at {GLOBS}"
        pytest.skip("there is no TensorRT backend yet")
    return [Source.of(path.name, path.read_text()) for path in paths]


def lines(found: list[str]) -> str:
    return "\n".join(["", *found])


# --- our sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", USED)
def test_used_is_in_every_release(owner: str) -> None:
    found = []
    for member in USED[owner]:
        allowed = GUARDED.get(f"{owner}.{member}", Guard(())).lacking
        missing = lacking(owner, member)
        if set(missing) != set(allowed):
            found.append(f"{owner}.{member} is not in {missing or 'no release'}; GUARDED has {allowed or 'nothing'}")
    assert not found, lines(found)


def test_guarded_is_used() -> None:
    keys = {f"{owner}.{member}" for owner, members in USED.items() for member in members}
    assert set(GUARDED) <= keys


def test_used_is_up_to_date(sources: list[Source]) -> None:
    idle = [
        f"{owner}.{member}: delete it from USED, no source uses it"
        for owner, members in USED.items()
        for member in members
        if not any(source.users_of(owner, member) for source in sources)
    ]
    assert not idle, lines(idle)


def test_sources_declare_what_they_use(sources: list[Source]) -> None:
    found = [problem for source in sources for problem in undeclared(source)]
    assert not found, lines(found)


def test_sources_ask_before_they_use(sources: list[Source]) -> None:
    found = [problem for source in sources for problem in unguarded(source)]
    assert not found, lines(found)


def test_sources_use_nothing_that_11_removed(sources: list[Source]) -> None:
    found = [problem for source in sources for problem in removed_in_11(source)]
    assert not found, lines(found)


# --- the checks can fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("trt.BuilderFlag.REFIT", "x.py:1: BuilderFlag.REFIT: not in USED"),
        ("self._trt.BuilderFlag.REFIT", "x.py:1: BuilderFlag.REFIT: not in USED"),
        ("trt.BuilderFlag.GPU_FALBACK", "x.py:1: BuilderFlag.GPU_FALBACK: not in USED"),
        ("trt.Refitter", "x.py:1: tensorrt.Refitter: not in USED"),
        ("import tensorrt as rt\nrt.Refitter", "x.py:2: tensorrt.Refitter: not in USED"),
        ("from tensorrt import Refitter", "x.py:1: tensorrt.Refitter: not in USED"),
        ("library().Refitter", "x.py:1: ?.Refitter: not in USED, nor in ORDINARY"),
        ("context.infer_shapes()", "x.py:1: ?.infer_shapes: not in USED, nor in ORDINARY"),
        ("self.context.infer_shapes()", "x.py:1: ?.infer_shapes: not in USED, nor in ORDINARY"),
        ("from .base import context\ncontext.infer_shapes()", "x.py:2: ?.infer_shapes: not in USED, nor in ORDINARY"),
        ("getattr(config, 'progress_monitor', None)", "x.py:1: ?.progress_monitor: not in USED, nor in ORDINARY"),
        (
            "class Progress(trt.IProgressMonitor):\n    def step_complete(self): ...",
            "x.py:2: IProgressMonitor.step_complete: not in USED",
        ),
    ],
)
def test_undeclared_is_found(text: str, problem: str) -> None:
    assert problem in undeclared(Source.of("x.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "trt.ILogger.Severity.ERROR",
        "class Log(trt.ILogger):\n    def log(self, severity, text): ...\n    def errors(self): ...",
        "import numpy as np\nnp.float32(np.int8)",
        "from tempfile import template\ntemplate.infer_shapes",
        "trt.__version__",
        "self.infer_shapes",  # an attribute of our own class
        "request.precision",
        "context.no_such_name",
    ],
)
def test_declared_is_accepted(text: str) -> None:
    assert undeclared(Source.of("x.py", text)) == []


def test_unguarded_is_found() -> None:
    bare = "config.set_compute_capability(trt.ComputeCapability.SM86, 0)"
    (capability, setter) = unguarded(Source.of("builder.py", bare))
    assert capability.startswith("builder.py:1: tensorrt.ComputeCapability: missing in 10.3, 10.13, 10.16, 11.4, and")
    assert setter.endswith('builder.py never asks hasattr(…, "ComputeCapability")')
    assert unguarded(Source.of("tensorrt_rtx.py", bare)) == []
    assert unguarded(Source.of("builder.py", f"if hasattr(trt, 'ComputeCapability'):\n    {bare}")) == []
    assert unguarded(Source.of("builder.py", f"known = getattr(trt, 'ComputeCapability', None)\n{bare}")) == []
    assert len(unguarded(Source.of("builder.py", f"known = getattr(trt, 'ComputeCapability')\n{bare}"))) > 1


@pytest.mark.parametrize(
    "text",
    [
        "config.set_flag(trt.BuilderFlag.FP16)",
        "config.set_flag(trt.BuilderFlag.INT8)",
        "config.set_flag(getattr(trt.BuilderFlag, 'INT8'))",
        "for flag in ('FP16', 'TF32'): config.set_flag(getattr(trt.BuilderFlag, flag))",
        "network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
        "config.int8_calibrator = calibrator",
        "setattr(config, 'int8_calibrator', calibrator)",
        "class Calibrator(trt.IInt8EntropyCalibrator2): ...",
        "layer.precision = trt.float16",
        "tensor.dynamic_range = (-1, 1)",
        "if engine.device_memory_size: ...",
        "if parser.supports_model(graph): ...",
        "if engine.has_implicit_batch_dimension: ...",
        "if builder.platform_has_fast_int8: ...",
    ],
)
def test_removed_is_found(text: str) -> None:
    assert removed_in_11(Source.of("x.py", text)) != []


@pytest.mark.parametrize(
    "text",
    [
        "if request.precision == 'fp16': name = tensor.name",
        "self.precision = precision",
        "trt.DataType.INT8",
        "engine.device_memory_size_v2",
        "'''FP16 comes from the graph; BuilderFlag.FP16 is gone.'''",
    ],
)
def test_present_is_not_taken_for_removed(text: str) -> None:
    assert removed_in_11(Source.of("x.py", text)) == []


# --- the tables are right ----------------------------------------------------------------------------------------

ALL = ("10.3", "10.13", "10.16", "11.4", "rtx-1.7")
UP_TO_10 = ("10.3", "10.13", "10.16")
FROM_10_13 = ("10.13", "10.16", "11.4", "rtx-1.7")
RTX = ("rtx-1.7",)


@pytest.mark.parametrize("path", INTERFACES, ids=lambda path: path.stem)
def test_tables_are_well_formed(path: Path) -> None:
    content = json.loads(path.read_text())
    assert set(content) == {"version", "source", "classes", "names"}
    assert content["version"].startswith(f"{path.stem.split('-')[-1]}.")
    assert content["source"].startswith("bindings wheel tensorrt_")
    assert content["source"].split("-")[1] == content["version"]
    assert "/" not in path.read_text()
    for members in (content["names"], *content["classes"].values()):
        assert members == sorted(set(members))
        assert not any(member.startswith("_") for member in members)
    assert {name for name in content["classes"] if "." not in name} < set(content["names"])
    assert len(content["classes"]) > 150
    assert sum(map(len, content["classes"].values())) > 1000


def test_releases() -> None:
    assert set(TABLES) == set(ALL)


@pytest.mark.parametrize(
    ("attribute", "releases"),
    [
        ("BuilderFlag.FP16", UP_TO_10),
        ("BuilderFlag.INT8", UP_TO_10),
        ("BuilderFlag.OBEY_PRECISION_CONSTRAINTS", UP_TO_10),
        ("IBuilderConfig.int8_calibrator", UP_TO_10),
        ("ILayer.precision", UP_TO_10),
        ("ITensor.dynamic_range", UP_TO_10),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", UP_TO_10),
        ("ICudaEngine.device_memory_size", UP_TO_10),
        ("OnnxParser.supports_model", UP_TO_10),
        ("tensorrt.IInt8EntropyCalibrator2", UP_TO_10),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", ALL),
        ("Builder.build_serialized_network", ALL),
        ("OnnxParser.supports_model_v2", ALL),
        ("ICudaEngine.device_memory_size_v2", ALL),
        ("IBuilderConfig.progress_monitor", ALL),
        ("IBuilderConfig.hardware_compatibility_level", ALL),
        ("BuilderFlag.STRIP_PLAN", ALL),
        ("IExecutionContext.execute_async_v3", ALL),
        ("DataType.INT8", ALL),
        ("DataType.itemsize", ALL),  # added by the Python half of the package
        ("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", FROM_10_13),
        ("BuilderFlag.EDITABLE_TIMING_CACHE", FROM_10_13),
        ("tensorrt.IRuntimeConfig", FROM_10_13),
        ("IBuilderConfig.tiling_optimization_level", FROM_10_13),
        ("ICudaEngine.get_engine_stat", ("10.16", "11.4", "rtx-1.7")),
        ("IBuilderConfig.build_route", ("11.4", "rtx-1.7")),
        ("tensorrt.ComputeCapability", RTX),
        ("ComputeCapability.SM121", RTX),
        ("ComputeCapability.SM87", ()),  # no Orin
        ("ICudaEngine.get_binding_index", ()),  # the index-based interface went before 10.3
    ],
)
def test_known_facts(attribute: str, releases: tuple[str, ...]) -> None:
    owner, _, member = attribute.rpartition(".")
    assert set(TABLES) - set(lacking(owner, member)) == set(releases)


def test_removed_are_computed() -> None:
    assert {"FP16", "EXPLICIT_BATCH", "int8_calibrator", "precision", "dynamic_range", "device_memory_size"} <= GONE
    assert {"supports_model", "IInt8EntropyCalibrator2", "PREFER_PRECISION_CONSTRAINTS"} <= GONE
    assert ("BuilderFlag", "INT8") in REMOVED
    assert not GONE & {"INT8", "name", "parse", "supports_model_v2", "STRONGLY_TYPED"}
    assert not GONE & {member for members in USED.values() for member in members}
    assert {member for _, member in REMOVED} >= GONE_BUT_ELSEWHERE
