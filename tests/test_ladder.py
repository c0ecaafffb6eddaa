"""The ladder: rungs made up of numbers, for which it climbs, and a real network for what it ships."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright import frontier, ladder
from edgewright.calibration.calib_cache import METHOD, CalibCache
from edgewright.calibration.collect import CalibrationTable, collect
from edgewright.ladder import Aim, CalibrationImages, Climb, Fidelity, Ladder
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.expected_flips import ExpectedFlips
from edgewright.optimize.mixed_precision import MixedPlan, MixedPoint
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import logits_of
from edgewright.optimize.work import planned_layers
from edgewright.rungs import Attempted, Ground, corrected, equalized, loosely_equalized
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.errors import CalibrationError
from edgewright.runtime.parity import compare
from mixed_network import LAYERS, network, photographs
from textual_graphs import graph, normal

Array = NDArray[Any]

CLASSES = 6
NO_FLIPS = ExpectedFlips(0.0, 0.0)
PLAIN = Aim(method="minmax", threads=1)


class Reaching(Ladder):
    """Content with a logit SQNR, as a test wants it."""

    target = math.inf

    def meets(self, fidelity: Fidelity) -> bool:
        return fidelity.sqnr_db >= self.target


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "SECONDS", 0.0)


# --- Rungs made up of numbers --------------------------------------------------------------------------------------
#
# y = W x + b, of whose inputs the last two say whether an image chooses or is held back, so that a candidate can err
# by as much as it likes on either.


def rows(count: int = 80) -> Array:
    """`[count, 6, 1, 1]`: four numbers, 1 where the image chooses, 1 where it is held back."""
    chooses = np.arange(count) % 4 != 3
    values = np.concatenate([normal("rows", count, 4), chooses[:, None], ~chooses[:, None]], axis=1)
    return values.astype(np.float32).reshape(count, CLASSES, 1, 1)


WEIGHT = np.concatenate([3 * normal("weight", CLASSES, 4), np.zeros((CLASSES, 2), np.float32)], axis=1)


def linear(weight: Array = WEIGHT) -> ir.Model:
    inputs, outputs = f"float[N, {CLASSES}, 1, 1] x", f"float[N, {CLASSES}] y"
    return graph("[flat] f = Flatten (x) [head] y = Gemm <transB = 1> (f, w)", inputs, outputs, w=weight)


IMAGES = CalibrationImages.divided(rows())
REFERENCE = {
    "choosing": IMAGES.choosing.reshape(-1, CLASSES) @ WEIGHT.T,
    "held back": IMAGES.held_back.reshape(-1, CLASSES) @ WEIGHT.T,
}


class Known(Quantizer):
    """One whose candidate has these logit SQNRs, in dB, on the images that choose and on those held back."""

    errors: tuple[float, float] = (300.0, 300.0)
    with_left_out: tuple[float, float] | None = None

    def runnable(self, left_out: Mapping[str, str] = NOTHING_LEFT_OUT) -> ir.Model:
        errors = self.errors if not left_out or self.with_left_out is None else self.with_left_out
        weight = WEIGHT.copy()
        for column, decibels, reference in zip((4, 5), errors, REFERENCE.values(), strict=True):
            power = (reference.astype(np.float64) ** 2).mean()
            weight[:, column] = np.sqrt(power / 10 ** (decibels / 10)) * np.resize([1.0, -1.0], CLASSES)
        return linear(weight)


def known(quantizer: Quantizer, choosing: float, held_back: float) -> Known:
    other = Known(quantizer.dialect, quantizer.model, quantizer.table, method="minmax")
    other.errors = (choosing, held_back)
    return other


@functools.cache
def measured() -> CalibrationTable:
    return collect(linear(), [IMAGES.choosing], identity={}, threads=1)


class Rungs:
    """The ladder's, replaced: each gives a candidate of known SQNRs, or nothing; what they were given is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: tuple[float, float], **rungs: Any) -> None:
        self.given: dict[str, Quantizer] = {}
        monkeypatch.setattr(ladder, "Quantizer", lambda *arguments, **options: known(Quantizer(*arguments), *start))
        monkeypatch.setattr(ladder, "RUNGS", tuple((name, self._rung(name, found)) for name, found in rungs.items()))

    def _rung(self, name: str, found: tuple[float, float] | None) -> Any:
        def make(ground: Ground, quantizer: Quantizer, left_out: Mapping[str, str]) -> Attempted:
            self.given[name] = quantizer
            return (None, "nothing to do") if found is None else (known(quantizer, *found), f"did {name}")

        return make


def climbed(target: float, aim: Aim = PLAIN, mixed: MixedPlan | None = None) -> Climb:
    class Made(Reaching):
        def _mixed(self, best: Any, placed: Mapping[str, str]) -> MixedPlan:
            assert mixed is not None, "mixed precision is not needed"
            return mixed

    Made.target = target
    return Made(linear(), measured(), IMAGES, aim).climb("cpu")


def taken(climb: Climb) -> list[str]:
    return [rung.name for rung in climb.rungs if rung.taken]


def test_the_made_up_candidates_err_by_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    Rungs(monkeypatch, (40.0, 30.0))
    (rung,) = climbed(39.0).rungs
    assert rung.choosing.sqnr_db == pytest.approx(40.0, abs=0.01)
    assert rung.held_back.sqnr_db == pytest.approx(30.0, abs=0.01)


def test_it_stops_at_the_first_candidate_within_the_aim(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = Rungs(monkeypatch, (20.0, 20.0), first=(30.0, 30.0), second=(40.0, 40.0), third=(50.0, 50.0))
    climb = climbed(35.0)
    assert taken(climb) == ["ranges", "first", "second"]
    assert set(rungs.given) == {"first", "second"}
    assert climb.met
    assert climb.mixed is None
    assert [rung.note for rung in climb.rungs[1:]] == ["did first", "did second"]


def test_no_rung_is_tried_where_the_ranges_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = Rungs(monkeypatch, (40.0, 40.0), first=(50.0, 50.0))
    climb = climbed(40.0 - 0.1)
    assert (taken(climb), rungs.given, climb.met) == (["ranges"], {}, True)


@pytest.mark.parametrize(
    ("worse", "word"),
    [((19.0, 25.0), "on those that choose"), ((30.0, 19.0), "on those held back"), ((20.02, 20.0), "within the noise")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rung_that_lowers_the_sqnr_is_shown_but_not_taken(
    monkeypatch: pytest.MonkeyPatch, worse: tuple[float, float], word: str
) -> None:
    rungs = Rungs(monkeypatch, (20.0, 20.0), worse=worse, better=(40.0, 40.0))
    climb = climbed(35.0)
    assert [(rung.name, rung.taken) for rung in climb.rungs] == [("ranges", True), ("worse", False), ("better", True)]
    assert rungs.given["worse"] is rungs.given["better"]
    assert "worse" not in climb.words


def test_a_little_less_on_the_held_back_images_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    Rungs(monkeypatch, (20.0, 20.0), better=(40.0, 19.97))
    assert taken(climbed(35.0)) == ["ranges", "better"]


def test_each_rung_stands_on_the_last_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": (25.0, 25.0), "b": (22.0, 22.0), "c": None, "d": (40.0, 40.0)}
    rungs = Rungs(monkeypatch, (20.0, 20.0), **found)
    climb = climbed(35.0)
    assert [quantizer.errors[0] for quantizer in rungs.given.values() if isinstance(quantizer, Known)] == [
        20.0, 25.0, 25.0, 25.0
    ]  # fmt: skip
    assert isinstance(climb.quantizer, Known)
    assert climb.quantizer.errors == (40.0, 40.0)
    assert taken(climb) == ["ranges", "a", "d"]


def test_a_candidate_that_is_not_a_number_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = Rungs(monkeypatch, (20.0, 20.0), nan=(math.nan, 30.0), better=(40.0, 40.0))
    climb = climbed(35.0)
    assert taken(climb) == ["ranges", "better"]
    broken = climb.rungs[1]
    assert (broken.choosing.sqnr_db, broken.choosing.agreement) == (ladder.LOST_DB, 0.0)
    assert 0 < broken.choosing.expected.loss <= 1
    json.dumps(climb.to_json(), allow_nan=False)
    assert rungs.given["better"] is rungs.given["nan"]


def test_a_start_that_is_not_a_number_is_left_for_anything_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    Rungs(monkeypatch, (math.nan, math.nan), poor=(5.0, 5.0))
    assert taken(climbed(1.0)) == ["ranges", "poor"]


def test_without_rescue_the_ranges_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = Rungs(monkeypatch, (20.0, 20.0), better=(40.0, 40.0))
    climb = climbed(35.0, replace(PLAIN, rescue=False))
    assert (taken(climb), rungs.given, climb.mixed, climb.met) == (["ranges"], {}, None, False)
    assert "the budget is not met on the calibration images" in climb.words


def plan_that_leaves_out_the_head() -> MixedPlan:
    parity = compare(REFERENCE["choosing"], REFERENCE["choosing"], None)
    before, chosen = MixedPoint((), 1.0, parity, NO_FLIPS), MixedPoint(("head",), 0.0, parity, NO_FLIPS)
    return MixedPlan({"head": "sensitive"}, True, before, chosen, (before, chosen))


def test_mixed_precision_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    Rungs(monkeypatch, (20.0, 20.0), better=(30.0, 30.0))
    monkeypatch.setattr(Known, "with_left_out", (40.0, 40.0))
    climb = climbed(35.0, mixed=plan_that_leaves_out_the_head())
    assert taken(climb) == ["ranges", "better", "mixed precision"]
    assert (climb.met, dict(climb.left_out)) == (True, {"head": "sensitive"})
    assert climb.quantized.int8_layers == 0
    assert any("head (sensitive)" in note for note in climb.notes)


def test_layers_in_float_that_flip_fewer_by_chance_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough is what meets the aim and is more exact than the rungs before: here 20 dB."""
    Rungs(monkeypatch, (20.0, 20.0))
    asked: list[Callable[[MixedPoint], bool]] = []

    def plan(quantizer: Quantizer, measured: Any, reference: Any, images: Any, meets: Any, **options: Any) -> MixedPlan:
        asked.append(meets)
        return plan_that_leaves_out_the_head()

    monkeypatch.setattr(ladder, "sensitivities", lambda *arguments, **options: [])
    monkeypatch.setattr(ladder, "smallest_float_set", plan)
    monkeypatch.setattr(ladder, "with_latencies", lambda points, *arguments, **options: points)
    Ladder(linear(), measured(), IMAGES, replace(PLAIN, budget=0.001)).climb("cpu")
    (enough,) = asked
    parity = plan_that_leaves_out_the_head().chosen.parity

    def point(decibels: float, flips: float) -> MixedPoint:
        return MixedPoint((), 1.0, replace(parity, sqnr_db=decibels), ExpectedFlips(flips, 0.0))

    assert [enough(point(*given)) for given in ((20.1, 0.0), (19.9, 0.0), (20.0, 0.0), (20.1, 0.01))] == [
        True,
        False,
        False,
        False,
    ]


def test_nothing_is_told_of_a_network_without_int8() -> None:
    climb = Ladder(linear(), measured(), IMAGES, PLAIN).climb("cpu", {"head": "slower"})
    assert (climb.quantized.int8_layers, climb.met, climb.notes) == (0, True, ())


def test_mixed_precision_that_does_worse_on_the_held_back_images_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    Rungs(monkeypatch, (20.0, 20.0))
    monkeypatch.setattr(Known, "with_left_out", (40.0, 10.0))
    climb = climbed(35.0, mixed=plan_that_leaves_out_the_head())
    assert [(rung.name, rung.taken) for rung in climb.rungs] == [("ranges", True), ("mixed precision", False)]
    assert (climb.met, climb.left_out, climb.quantized.int8_layers) == (False, {}, 1)
    assert not any("stay in" in note for note in climb.notes)
    assert "the budget is not met" in climb.words


@pytest.mark.parametrize(
    ("loss", "flips", "met"),
    [(0.0, 0.0, True), (0.0025, 0.02, True), (0.0026, 0.02, False), (0.0, 0.021, False)],
)
def test_the_aim_is_part_of_the_budget(loss: float, flips: float, met: bool) -> None:
    """Of a point: a quarter of it may be expected to be lost, twice as many images answered otherwise."""
    climber = Ladder(linear(), measured(), IMAGES, replace(PLAIN, budget=0.01))
    assert climber.meets(Fidelity(1.0, 10.0, ExpectedFlips(flips, loss))) is met


def test_progress_says_which_rung() -> None:
    told: list[tuple[int, int, str]] = []
    aim = replace(PLAIN, budget=0.0)
    climber = Reaching(network(), table(), PICTURES, aim, lambda *words: told.append(words))
    climber.target = 42.0
    climber.climb("cpu")
    assert [word for _, _, word in told][-1] == "equalization"
    assert told[-1][:2] == (len(PICTURES.choosing), len(PICTURES.choosing))


# --- Which images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (5, 1), (8, 2), (30, 7)])
def test_every_fourth_image_is_held_back(count: int, held: int) -> None:
    batch = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    images = CalibrationImages.divided(batch)
    if not held:
        np.testing.assert_array_equal(images.choosing, batch)
        np.testing.assert_array_equal(images.held_back, batch)
        return
    assert images.held_back.ravel().tolist() == list(range(3, count, 4))
    assert sorted([*images.held_back.ravel(), *images.choosing.ravel()]) == list(range(count))


# --- A real network -------------------------------------------------------------------------------------------------

PICTURES = CalibrationImages.divided(photographs(44, seed=1))
WITHOUT_LEARNING = (
    ("equalization", equalized),
    ("loose equalization", loosely_equalized),
    ("bias correction", corrected),
)


@functools.cache
def table() -> CalibrationTable:
    return collect(network(), [PICTURES.choosing], identity={}, threads=1)


def reaching(target: float, aim: Aim = PLAIN) -> Reaching:
    climber = Reaching(network(), table(), PICTURES, aim)
    climber.target = target
    return climber


def bytes_of(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


@pytest.fixture
def without_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "RUNGS", WITHOUT_LEARNING)


@pytest.fixture
def _a_layer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In INT8 "project" has nothing to do with what it is in float."""
    integers = {"project": np.random.default_rng(4).integers(-127, 128, (16, 32, 1, 1), np.int8)}
    broken = functools.partial(Quantizer, repairs=Repairs(integers=integers))
    monkeypatch.setattr(ladder, "Quantizer", broken)
    monkeypatch.setattr(ladder, "RUNGS", ())


@pytest.mark.usefixtures("_a_layer_is_broken")
@pytest.mark.parametrize("dialect", ["cpu", "openvino", "tensorrt"])
def test_mixed_precision_leaves_the_broken_layer_in_float_and_what_does_not_pay_stays_there(dialect: str) -> None:
    if BACKENDS["openvino"].absence() is not None and dialect == "openvino":
        pytest.skip("the package openvino is not installed")
    before = bytes_of(network())
    placed = {"last": "INT8 is slower here"}
    climb = reaching(28.0).climb(dialect, placed)
    assert taken(climb) == ["ranges", "mixed precision"]
    assert climb.rungs[0].choosing.sqnr_db < 10
    assert (climb.met, set(climb.left_out)) == (True, {"last", "project"})
    assert climb.left_out["last"] == placed["last"]
    precisions = {layer.name: layer.precision for layer in planned_layers(climb.quantized.model)}
    assert {name for name in climb.quantizer.layers if precisions[name] != "int8"} == {"last", "project"}
    reasons = {decision.node: decision.reason for decision in climb.quantized.plan.decisions}
    assert placed["last"] in reasons["last"]
    assert climb.mixed is not None
    assert climb.mixed.chosen.float_layers == ("project",)
    assert not any("last" in point.float_layers for point in climb.mixed.frontier)
    assert bytes_of(network()) == before
    json.dumps(climb.to_json(), allow_nan=False)


def test_with_nothing_left_to_quantize_there_is_nothing_to_mend() -> None:
    climb = reaching(200.0).climb("cpu", dict.fromkeys(LAYERS, "slower"))
    assert (taken(climb), climb.met, climb.quantized.int8_layers) == (["ranges"], True, 0)
    assert bytes_of(climb.quantizer.runnable(climb.left_out)) == bytes_of(climb.quantizer.model.clone())


@pytest.mark.usefixtures("without_learning")
def test_the_same_seed_gives_the_same_graph() -> None:
    first, second = (reaching(47.0).climb("cpu") for _ in range(2))
    assert taken(first) == ["ranges", "equalization", "bias correction"]
    assert bytes_of(first.quantized.model) == bytes_of(second.quantized.model)
    assert [replace(rung, seconds=0) for rung in first.rungs] == [replace(rung, seconds=0) for rung in second.rungs]


@pytest.mark.usefixtures("without_learning")
def test_fidelity_is_measured_against_the_network_as_it_was() -> None:
    climb = reaching(42.0).climb("cpu")
    assert taken(climb) == ["ranges", "equalization"]
    expected, found = (
        logits_of(model, PICTURES.held_back, threads=1).astype(np.float64)
        for model in (network(), climb.quantized.model)
    )
    sqnr = 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())
    assert climb.rungs[-1].held_back.sqnr_db == pytest.approx(sqnr, abs=1e-3)


def test_a_calibration_cache_serves_nvidias_dialects_alone() -> None:
    cache = CalibCache("TRT-8501-EntropyCalibration2", {"a": np.float32(0.125), "l": np.float32(0.25)})
    climber = reaching(0.0, replace(PLAIN, cache=cache))
    nvidia, cpu = climber.climb("tensorrt"), climber.climb("cpu")
    assert nvidia.quantizer.ranges["a"].method == METHOD
    assert nvidia.quantizer.ranges["a"].high == 127 * 0.125
    scales = {node.name: node.inputs[1] for node in nvidia.quantized.model.graph if node.op_type == "QuantizeLinear"}
    chosen = scales["a::quantize"]
    assert chosen is not None
    assert chosen.const_value is not None
    assert float(chosen.const_value.numpy()) == 0.125
    assert METHOD not in {interval.method for interval in cpu.quantizer.ranges.values()}


def test_the_cache_of_another_network_is_refused() -> None:
    cache = CalibCache("TRT-8501-EntropyCalibration2", {"images": np.float32(0.5)})
    climber = reaching(0.0, replace(PLAIN, cache=cache))
    assert climber.climb("cpu").met
    with pytest.raises(CalibrationError, match="knows none of the"):
        climber.climb("tensorrt")
