"""What engines are fed: real ones, on this processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.runtime.bench import Candidate, Selection, SetUp, candidates_of, feeding
from edgewright.runtime.bench.feeding import Run, check_fits
from edgewright.runtime.device.memory import Memory
from edgewright.runtime.errors import InputError
from edgewright.runtime.specs import BatchProfile, TensorSpec
from timed_engines import identity_onnx
from toy_build import PREPROCESS, put_engine

ONE = SetUp(1, 1)
Array = NDArray[Any]


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    """An engine of a build folder, for images of 8 × 8 pixels."""
    ((found,), _) = candidates_of(put_engine(tmp_path), Selection())
    return found


def of_file(path: Path) -> Candidate:
    ((found,), _) = candidates_of(path, Selection())
    return found


def fed(candidate: Candidate, setup: SetUp, monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """What the engine gets in a run."""
    with candidate.open(1) as runner:
        seen: list[dict[str, Array]] = []

        def infer(feeds: dict[str, Array]) -> dict[str, Array]:
            seen.append(feeds)
            return {}

        monkeypatch.setattr(runner, "infer_impl", infer)
        run = Run(candidate, runner, setup)
        run()
        run.prove()
    first, second = seen
    assert all(np.array_equal(first[name], second[name]) for name in first), "every run has the same input"
    return first


@pytest.mark.parametrize("inputs", [(), (TensorSpec("x", (), "float32"),)])
def test_an_engine_without_a_batch_is_refused(candidate: Candidate, inputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(InputError, match="takes no batch as its first input"):
        check_fits(replace(candidate, inputs=inputs), ONE)


@pytest.mark.parametrize("batch", [1, 8])
def test_tensors_are_normal_numbers(candidate: Candidate, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (array,) = fed(candidate, SetUp(batch, 1), monkeypatch).values()
    assert (array.shape, array.dtype.name) == ((batch, 3, 8, 8), "float32")
    assert abs(array.mean()) < 0.3
    assert 0.7 < array.std() < 1.3


@pytest.mark.parametrize(("kind", "dtype"), [("float16", "float16"), ("int64", "int64"), ("bool", "bool")])
def test_inputs_of_other_types(tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (array,) = fed(of_file(identity_onnx(tmp_path / "n.onnx", kind=kind)), SetUp(2, 1), monkeypatch).values()
    assert (array.shape, array.dtype) == ((2, 3, 4, 4), np.dtype(dtype))
    assert array.dtype.kind == "f" or set(np.unique(array).tolist()) == {0, 1}


def test_images_of_the_cameras_size_are_preprocessed(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    (array,) = fed(candidate, SetUp(2, 1, (12, 9)), monkeypatch).values()
    images = np.random.default_rng(feeding.SEED).integers(0, 256, (2, 9, 12, 3), np.uint8)
    np.testing.assert_array_equal(array, PREPROCESS.batch(list(images)))


def test_the_time_of_preprocessing_is_known(candidate: Candidate) -> None:
    with candidate.open(1) as runner:
        plain, whole = Run(candidate, runner, ONE), Run(candidate, runner, SetUp(1, 1, (640, 480)))
        plain()
        whole()
    assert plain.preprocess_ms is None
    assert whole.preprocess_ms is not None
    assert whole.preprocess_ms > 0.1  # 640 × 480 pixels are resized


def test_an_onnx_file_has_no_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not say how its images are preprocessed; leave out --preprocess"):
        check_fits(of_file(identity_onnx(tmp_path / "n.onnx")), SetUp(1, 1, (640, 480)))


def test_open_sides_are_refused(tmp_path: Path) -> None:
    file = of_file(identity_onnx(tmp_path / "n.onnx", sides="N, 3, H, W"))
    with pytest.raises(InputError, match=r"leaves the size of its input 'x' open: \[\?, 3, \?, \?\]"):
        check_fits(file, ONE)


@pytest.mark.parametrize(
    ("batch", "said"),
    [(1, "takes batches from 2 to 8, asked for was 1"), (9, "takes batches from 2 to 8"), (2, ""), (8, "")],
)
def test_the_batch_is_within_the_profile(candidate: Candidate, batch: int, said: str) -> None:
    assert candidate.info is not None
    profiled = replace(candidate, info=replace(candidate.info, profile=BatchProfile(2, 4, 8)))
    if not said:
        check_fits(profiled, SetUp(batch, 1))
        return
    with pytest.raises(InputError, match=said):
        check_fits(profiled, SetUp(batch, 1))


def test_a_fixed_batch(tmp_path: Path) -> None:
    file = of_file(identity_onnx(tmp_path / "n.onnx", sides="4, 3, 4, 4"))
    check_fits(file, SetUp(4, 1))
    with pytest.raises(InputError, match="takes batches of 4, asked for was 1; give --batch 4"):
        check_fits(file, ONE)


@pytest.mark.parametrize("setup", [SetUp(1024, 1), SetUp(8, 1, (640, 480))], ids=["tensors", "images"])
def test_what_does_not_fit_the_memory_is_refused(
    candidate: Candidate, setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "memory_here", lambda: Memory(4_000_000, 2_000_000))
    with pytest.raises(InputError, match="GB are available; choose a smaller --batch or --camera"):
        check_fits(candidate, setup)
    monkeypatch.setattr(feeding, "memory_here", lambda: None)
    check_fits(candidate, setup)
