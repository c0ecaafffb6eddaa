"""The plain types: exact through JSON, immutable, and honest about what a damaged description is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import EngineInfo, LayerPrecision, OnnxArtifact, TensorSpec

INPUT = TensorSpec("image", (None, 3, 64, 48), "float32")
OUTPUT = TensorSpec("logits", (None, 3), "float32")
PREPROCESS = Preprocess((64, 48), (64, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
ARTIFACT = OnnxArtifact("model.onnx", "ab" * 32, 19, (INPUT,), (OUTPUT,), PREPROCESS, ("a", "b", "é"))
LAYERS = (LayerPrecision("c1", "Conv", "fp32"), LayerPrecision("c2", "QLinearConv", "int8"))
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
    layers=(*LAYERS, LayerPrecision("c3", "QLinearConv", "int8")),
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
    assert content["schema"] == "edgewright.engine-info/1"
    assert EngineInfo.from_json(content) == info


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(EngineInfo) if field.name not in ("versions",)]
)
def test_every_field_counts_and_is_needed(field: str) -> None:
    content = through_json(INFO.to_json())
    removed = content.pop(field)
    with pytest.raises(KeyError):
        EngineInfo.from_json(content)
    content[field] = [] if isinstance(removed, list) else "other"
    if field not in ("preprocess",):
        assert EngineInfo.from_json(content) != INFO


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    content = through_json(INFO.to_json()) | {"later": 1}
    assert EngineInfo.from_json(content) == INFO


def test_a_nonsensical_preprocessing_is_refused() -> None:
    content = through_json(INFO.to_json())
    content["preprocess"]["std"] = [0.0, 1.0, 1.0]
    with pytest.raises(DataError, match="std above 0"):
        EngineInfo.from_json(content)


def test_actual_precision_counts_layers() -> None:
    assert INFO.actual_precision == {"fp32": 1, "int8": 2}
    assert dataclasses.replace(INFO, layers=()).actual_precision == {}


@pytest.mark.parametrize("value", [INPUT, ARTIFACT, INFO, LAYERS[0]])
def test_specs_are_immutable(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, "changed")
