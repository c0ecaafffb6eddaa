"""The plain types: exact through JSON, immutable, and honest about what a damaged description is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.runtime.errors import BuildError, DataError
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import BatchProfile, EngineInfo, Kernel, LayerPrecision, OnnxArtifact, TensorSpec

INPUT = TensorSpec("image", (None, 3, 64, 48), "float32")
OUTPUT = TensorSpec("logits", (None, 3), "float32")
PREPROCESS = Preprocess((64, 48), (64, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
ARTIFACT = OnnxArtifact("model.onnx", "ab" * 32, 19, (INPUT,), (OUTPUT,), ("a", "b", "é"))
LAYERS = (
    LayerPrecision("c1", "Conv", "fp32", "fp32", 900, "c1_nchwc"),
    LayerPrecision("c2", "Conv", "int8", "int8", 100, "c2_quant"),
)
KERNELS = (
    Kernel("c1_nchwc", "Conv", ("c1", "relu"), "fp32", 4000, 1000, True),
    Kernel("copy", "kgen", (), "int8"),
)
INFO = EngineInfo(
    backend="onnxruntime",
    precision="int8",
    target=None,
    inputs=(INPUT,),
    outputs=(OUTPUT,),
    preprocess=PREPROCESS,
    labels=("a", "b", "é"),
    onnx_sha256="ab" * 32,
    engine_sha256="cd" * 32,
    bytes=123,
    layers=(*LAYERS, LayerPrecision("c3", "Gemm", "int8", "missing", 7, "")),
    kernels=KERNELS,
    profile=BatchProfile(1, 4, 16),
    versions={"onnxruntime": "1.2.3"},
)


def through_json(content: Any) -> Any:
    return json.loads(json.dumps(content, allow_nan=False))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.none() | st.integers(0, 2**40)), st.sampled_from(["float32", "float16", "int64"]))
def test_tensor_spec_round_trip(name: str, shape: list[int | None], dtype: str) -> None:
    spec = TensorSpec(name, tuple(shape), dtype)
    assert TensorSpec.from_json(through_json(dataclasses.asdict(spec))) == spec


def test_artifact_round_trip() -> None:
    again = OnnxArtifact.from_json(through_json(ARTIFACT.to_json()))
    assert again == ARTIFACT
    assert hash(again) == hash(ARTIFACT)


@pytest.mark.parametrize("target", [None, "sm86"])
def test_engine_info_round_trip(target: str | None) -> None:
    info = dataclasses.replace(INFO, target=target)
    content = through_json(info.to_json())
    assert content["schema"] == "edgewright.engine-info/2"
    assert EngineInfo.from_json(content) == info


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(EngineInfo) if field.name not in ("versions", "dla")]
)
def test_every_field_counts_and_is_needed(field: str) -> None:
    content = through_json(INFO.to_json())
    removed = content.pop(field)
    with pytest.raises(KeyError):
        EngineInfo.from_json(content)
    content[field] = [] if isinstance(removed, list) else "other"
    if field not in ("preprocess", "profile"):
        assert EngineInfo.from_json(content) != INFO


def test_an_engine_of_before_has_no_dla_core() -> None:
    content = through_json(dataclasses.replace(INFO, dla=1).to_json())
    assert EngineInfo.from_json(content).dla == 1
    del content["dla"]
    assert EngineInfo.from_json(content).dla is None


@pytest.mark.parametrize("profile", [None, BatchProfile(2, 2, 2)])
def test_the_batch_sizes_may_be_any(profile: BatchProfile | None) -> None:
    info = dataclasses.replace(INFO, profile=profile)
    assert EngineInfo.from_json(through_json(info.to_json())) == info


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_round_trip(kernel: Kernel) -> None:
    assert Kernel.from_json(through_json(dataclasses.asdict(kernel))) == kernel


@pytest.mark.parametrize("part", ["layers", "kernels", "profile"])
def test_a_part_with_an_unknown_field_is_refused(part: str) -> None:
    content = through_json(INFO.to_json())
    (content[part] if part == "profile" else content[part][0])["later"] = 1
    with pytest.raises(TypeError, match="later"):
        EngineInfo.from_json(content)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 32), (4, 4, 9), (3, 9, 9)])
def test_batch_sizes_in_order(sizes: tuple[int, int, int]) -> None:
    profile = BatchProfile(*sizes)
    assert (profile.minimum, profile.optimum, profile.maximum) == sizes


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, 1, 1), (2, 1, 3), (1, 4, 3), (3, 2, 1)])
def test_batch_sizes_out_of_order(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match=rf"{sizes[0]}, {sizes[1]}, {sizes[2]} are not in order; give 1 ≤ minimum"):
        BatchProfile(*sizes)


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    content = through_json(INFO.to_json()) | {"later": 1}
    assert EngineInfo.from_json(content) == INFO


def test_a_nonsensical_preprocessing_is_refused() -> None:
    content = through_json(INFO.to_json())
    content["preprocess"]["std"] = [0.0, 1.0, 1.0]
    with pytest.raises(DataError, match="std above 0"):
        EngineInfo.from_json(content)


def test_actual_precision_counts_layers() -> None:
    assert INFO.actual_precision == {"fp32": 1, "int8": 1, "missing": 1}
    assert dataclasses.replace(INFO, layers=()).actual_precision == {}


@pytest.mark.parametrize("value", [INPUT, ARTIFACT, INFO, LAYERS[0], KERNELS[0], BatchProfile()])
def test_specs_are_immutable(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, "changed")
