"""Accuracy parity as an assertion, for tests of one's own model.

    from edgewright.testing import assert_parity

    def test_the_engine_answers_like_the_model():
        assert_parity(model, "build/my-model/engines/onnxruntime-int8.onnx", labels, images=batch, max_drop=0.5)

docs/testing.md has more, and the fixture `edgewright_build`, which builds the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from edgewright.runtime.errors import ParityError
from edgewright.runtime.figures import further_figures
from edgewright.runtime.gates import gates_of, judge
from edgewright.runtime.parity import Parity, compare
from edgewright.runtime.session import Session
from edgewright.verdict_report import evidence_lines

__all__ = ["Answers", "assert_parity"]

Answers: TypeAlias = ArrayLike | Callable[[NDArray[np.float32]], Any] | str | Path
"""Logits `[N, classes]`, or what gives them for images: a function of a batch, a PyTorch module, an engine file."""
BATCH = 32


def assert_parity(
    reference: Answers,
    engine: Answers,
    labels: ArrayLike | None = None,
    *,
    images: Any = None,
    max_drop: float | None = None,
    min_ratio: float | None = None,
    min_agreement: float | None = None,
    min_sqnr: float | None = None,
    allow_inconclusive: bool = False,
) -> Parity:
    """Passes if `engine` predicts what `reference` predicts, within the gates; returns the figures.

    * reference, engine: logits `[N, classes]`; or, with `images`, a function of a batch `[n, C, H, W]` such as a
      PyTorch module, or the path of an engine file, a build folder or a bundle
    * labels: the right class of each image, integers `[N]`; without them `max_drop` is asked of the disagreement
    * images: a float32 batch `[N, C, H, W]`; or images as `Session.classify` takes them, which an engine file among
      the two then preprocesses for both
    * max_drop: points of top-1, 0.5 unless it or `min_ratio` is given; min_ratio: of both top-1; min_agreement: a
      share of the images; min_sqnr: of the logits, in dB. All that are given have to hold.
    * allow_inconclusive: whether too few images to decide will do

    Raises `AssertionError` with the verdict and the numbers, `ParityError` where a comparison has no meaning.
    """
    gates = gates_of(max_drop=max_drop, min_ratio=min_ratio, min_agreement=min_agreement, min_sqnr=min_sqnr)
    expected, answered = _logits(reference, engine, images)
    known = None if labels is None else np.asarray(labels)
    parity = compare(expected, answered, known)
    verdict = judge(parity, gates)
    if verdict.word == "fail" or (verdict.word == "inconclusive" and not allow_inconclusive):
        lines = evidence_lines(parity, further_figures(expected, answered, known))
        raise AssertionError("\n".join([verdict.sentence, *lines]))
    return parity


def _logits(reference: Answers, engine: Answers, images: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of both, `[N, classes]`."""
    if isinstance(images, str | Path | Image.Image):
        raise ParityError("images is a single image", "put it into a list")
    if images is not None and not len(images):
        raise ParityError("there are no images", "give one or more")
    if images is not None and not isinstance(images, np.ndarray):
        images = _preprocessed(images, reference, engine)
    return _answers(reference, images, "reference"), _answers(engine, images, "engine")


def _preprocessed(images: Any, *sides: Answers) -> NDArray[np.float32]:
    """Images `[N, C, H, W]` as an engine among the two sides takes them; what is a batch already, as it is."""
    if hasattr(images, "__array__") and getattr(images, "ndim", 0) == 4:
        return np.asarray(images, np.float32)
    for side in sides:
        if _is_engine(side):
            with Session.open(str(side)) as session:
                return session.preprocess(list(images))
    raise ParityError(
        "neither side is an engine file, so that nothing says how images are preprocessed",
        "give images as a float32 batch [N, C, H, W]",
    )


def _answers(side: Answers, images: NDArray[np.float32] | None, role: str) -> NDArray[Any]:
    if not callable(side) and not _is_engine(side):
        return _array(side)
    if images is None:
        raise ParityError(f"the {role} gives logits for images, and there are none", "give images=")
    if callable(side):
        return _of_function(side, images)
    with Session.open(str(side)) as session:
        parts = [_only(session.infer(part)) for part in _parts(images, session.inputs[0].shape[0])]
    return np.concatenate(parts)


def _of_function(function: Callable[[Any], Any], images: NDArray[np.float32]) -> NDArray[Any]:
    """Of a PyTorch module in inference mode, batch normalization with the statistics that it learned."""
    if not hasattr(function, "state_dict"):
        return np.concatenate([_of_part(function(part), part) for part in _parts(images)])
    import torch

    assert isinstance(function, torch.nn.Module)
    modes = [(module, module.training) for module in function.modules()]
    function.eval()
    try:
        with torch.inference_mode():
            device = next((parameter.device for parameter in function.parameters()), torch.device("cpu"))
            answers = [_of_part(function(torch.from_numpy(part).to(device)), part) for part in _parts(images)]
            return np.concatenate(answers)
    finally:
        for module, training in modes:
            module.training = training


def _parts(images: NDArray[np.float32], size: int | None = None) -> Sequence[NDArray[np.float32]]:
    return [images[start : start + (size or BATCH)] for start in range(0, len(images), size or BATCH)]


def _of_part(answer: Any, part: NDArray[np.float32]) -> NDArray[Any]:
    """The logits of a batch. Raises `ParityError` if there is not a row for each of its images."""
    logits = _array(answer)
    if logits.ndim != 2 or len(logits) != len(part):
        raise ParityError(
            f"for a batch of {len(part)} images the answer is {list(logits.shape)}", "return logits [N, classes]"
        )
    return logits


def _array(logits: Any) -> NDArray[Any]:
    """A tensor of PyTorch too, wherever it lies, of any type of numbers. Raises `ParityError` if it is no array."""
    if hasattr(logits, "detach"):
        logits = logits.detach().cpu()
        logits = logits.float() if "bfloat16" in str(logits.dtype) else logits  # numpy does not know it
    try:
        if isinstance(logits, dict):
            raise TypeError
        return np.asarray(logits)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParityError(
            f"the logits are a {type(logits).__name__} that is no array", "give, or return, logits [N, classes] alone"
        ) from error


def _only(outputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    (logits,) = outputs.values()
    return logits


def _is_engine(side: Any) -> bool:
    return isinstance(side, str | Path)
