"""Every checkpoint that ships, at every precision, on every backend that runs on a CPU, beside PyTorch.

By default on 300 of the 10,000 test images and an eighth of the calibration images, which takes seconds and can decide
a budget of 4 points. The same on all of them, with the budget of the contract, is marked `slow`:

    pytest -m slow tests/parity
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgewright import graphs
from edgewright.built_model import BuiltModel, built_model
from edgewright.calibration.image_set import ImageSet
from edgewright.export.models import MODELS

SHIPPED = [name for name, entry in MODELS.items() if any(each.origin == "shipped" for each in entry.weights.values())]
ROWS = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
]
FEWER = {"fashion_mnist_test": 300, "fashion_mnist_calibration": 128}  # images
LEAST_SQNR_DB = {"fp32": 80.0, "bf16": 20.0, "int8": 12.0}  # 24, 8 and 8 bits, of logits after some layers

cases = pytest.mark.parametrize(("name", "backend", "precision"), [(name, *row) for name in SHIPPED for row in ROWS])


def evenly(images: ImageSet, count: int) -> ImageSet:
    return images.subset(np.arange(count) * len(images) // count)


@pytest.fixture(scope="module")
def _fewer_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, count in FEWER.items():
            shipped = getattr(graphs, name)
            patch.setattr(graphs, name, functools.cache(lambda shipped=shipped, count=count: evenly(shipped(), count)))
        yield


@functools.cache
def model_of(name: str, build_dir: Path, max_drop: float, min_agreement: float) -> BuiltModel:
    return built_model(name, build_dir=build_dir, max_drop=max_drop, min_agreement=min_agreement, target="sm86")


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def test_what_ships_is_tested() -> None:
    shipped = {path.stem for path in Path("export/zoo/weights").resolve().glob("*.safetensors")}
    assert set(SHIPPED) == shipped
    assert len(SHIPPED) >= 4


@pytest.mark.usefixtures("_fewer_images")
@cases
def test_parity(build_dir: Path, name: str, backend: str, precision: str) -> None:
    row = model_of(name, build_dir, 4.0, 0.93).assert_parity(backend, precision)
    assert row.parity is not None
    assert (row.parity.images, row.parity.labelled) == (300, True)
    assert row.parity.sqnr_db is not None
    assert row.parity.sqnr_db >= LEAST_SQNR_DB[precision]


@pytest.mark.slow
@cases
def test_parity_on_all_images(
    tmp_path_factory: pytest.TempPathFactory, name: str, backend: str, precision: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "all-images"
    row = model_of(name, folder, 0.5, 0.97).assert_parity(backend, precision)
    assert row.parity is not None
    assert row.parity.images == 10_000
