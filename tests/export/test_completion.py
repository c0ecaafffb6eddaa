"""What a network does not say, said by a person; what is still missing; what contradicts itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgewright.export.completion import Completion, completed
from edgewright.export.entries import ModelSource
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.preprocess import Preprocess

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KNOWN = Preprocess(40, (32, 32), MEAN, STD, interpolation="bicubic")
SILENT = ModelSource(build=lambda: pytest.fail("the module is not needed"))
SPEAKING = replace(SILENT, preprocess=KNOWN, input_shape=(3, 32, 32), labels=("a", "b"))
GRAPH = ModelSource(onnx=Path("net.onnx"), input_shape=(3, 32, 32))

SAID: dict[str, dict[str, Any]] = {
    "--input-shape": {"input_shape": (3, 32, 32)},
    "--mean": {"mean": MEAN},
    "--std": {"std": STD},
    "--resize": {"resize": (32, 32)},
    "--labels": {"labels": ("a", "b")},
}


def said(**parts: Any) -> Completion:
    return Completion(**parts)


@pytest.mark.parametrize("given", [c for n in range(6) for c in itertools.combinations(SAID, n)], ids="+".join)
def test_every_combination_lacks_what_was_not_said(given: tuple[str, ...]) -> None:
    """The input shape follows from a resize and a normalization."""
    parts = {key: value for option in given for key, value in SAID[option].items()}
    source = completed(SILENT, said(**parts))
    known = set(given)
    if "--resize" in given and {"--mean", "--std"} & set(given):
        known.add("--input-shape")
    assert source.missing == tuple(option for option in SAID if option not in known)
    expected = Preprocess((32, 32), None, MEAN, STD) if known >= {*SAID} - {"--labels"} else None
    assert source.preprocess == expected
    assert source.input_shape == ((3, 32, 32) if "--input-shape" in known else None)


def test_nothing_said_changes_nothing() -> None:
    assert completed(SPEAKING, said()) == SPEAKING


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"mean": (0.1,) * 3}, replace(KNOWN, mean=(0.1,) * 3)),
        ({"std": (0.1,) * 3}, replace(KNOWN, std=(0.1,) * 3)),
        ({"interpolation": "lanczos"}, replace(KNOWN, interpolation="lanczos")),
        ({"resize": (64, 48)}, replace(KNOWN, resize=(64, 48), crop=None)),
        ({"crop": (24, 28)}, replace(KNOWN, resize=None, crop=(24, 28))),
        ({"resize": 30, "crop": (24, 28)}, replace(KNOWN, resize=30, crop=(24, 28))),
        ({"resize": 64, "crop": (48, 48), "input_shape": (3, 48, 48)}, replace(KNOWN, resize=64, crop=(48, 48))),
        ({"input_shape": (3, 32, 32)}, KNOWN),
        (
            {"mean": (0.5,), "std": (0.2,), "input_shape": (1, 28, 28), "resize": (28, 28)},
            Preprocess((28, 28), None, (0.5,), (0.2,), "bicubic", "L"),
        ),
    ],
    ids=str,
)
def test_what_is_said_goes_before_what_the_source_says(parts: dict[str, Any], expected: Preprocess) -> None:
    source = completed(SPEAKING, said(**parts))
    assert (source.preprocess, source.input_shape, source.missing) == (expected, expected.input_shape, ())
    assert source.labels == ("a", "b")


def test_labels() -> None:
    assert completed(SPEAKING, said(labels=("x", "y"))).labels == ("x", "y")
    assert completed(SILENT, said(labels=("x", "y"))).labels == ("x", "y")
    assert completed(SPEAKING, said(labels=())).labels == ()


def test_another_size_leaves_the_way_to_it_open() -> None:
    source = completed(SPEAKING, said(input_shape=(3, 48, 48)))
    assert (source.preprocess, source.input_shape, source.missing) == (None, (3, 48, 48), ("--resize",))


def test_other_channels_leave_the_normalization_open() -> None:
    source = completed(SPEAKING, said(input_shape=(1, 32, 32)))
    assert (source.preprocess, source.missing) == (None, ("--mean", "--std", "--resize"))


def test_a_graph_says_its_shape() -> None:
    assert completed(GRAPH, said()).missing == ("--mean", "--std", "--resize", "--labels")
    source = completed(GRAPH, said(mean=MEAN, std=STD, resize=40, crop=(32, 32)))
    assert source.preprocess == replace(KNOWN, interpolation="bilinear")
    assert source.onnx == Path("net.onnx")


@pytest.mark.parametrize(
    ("source", "parts", "words"),
    [
        (GRAPH, {"mean": MEAN, "std": STD, "resize": (40, 40)}, "images of 3×40×40 come out of .* takes 3×32×32"),
        (GRAPH, {"mean": MEAN, "std": STD, "crop": (40, 40)}, "images of 3×40×40 come out of"),
        (SILENT, {"mean": MEAN, "input_shape": (3, 8, 8), "resize": (9, 9)}, "images of 3×9×9 come out of"),
        (GRAPH, {"mean": (0.5,), "std": (0.5,), "resize": (32, 32)}, "--mean and --std have 1 channels, .* takes 3;"),
        (SPEAKING, {"mean": MEAN, "input_shape": (1, 32, 32)}, "--mean and --std have 3 channels, .* takes 1;"),
        (GRAPH, {"mean": MEAN, "std": STD, "resize": 40}, r"shorter side to 40 gives no images.*add --crop 32,32"),
        (SILENT, {"mean": (0.5,) * 4, "std": (0.5,) * 4, "resize": (8, 8)}, r"takes 4 channels; images have 1 .* or 3"),
    ],
)
def test_contradictions_are_refused(source: ModelSource, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        completed(source, said(**parts))


@pytest.mark.parametrize(
    "parts", [{"mean": (0.5,)}, {"std": (0.5, 0.0, 0.5)}, {"interpolation": "cubic"}, {"resize": (0, 4)}], ids=str
)
def test_values_that_mean_nothing_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        completed(SPEAKING, said(**parts))


@pytest.mark.parametrize("given", [{}, {"build": lambda: None, "onnx": Path("x.onnx")}], ids=["neither", "both"])
def test_a_source_is_a_module_or_a_graph(given: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="the model source 'mine' needs either a module or an ONNX file"):
        ModelSource(name="mine", **given)
