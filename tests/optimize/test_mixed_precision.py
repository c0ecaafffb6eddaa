"""The search for the smallest set of float layers: by brute force over all sets, and on networks made up of numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.optimize import mixed_precision as module
from edgewright.optimize.mixed_precision import Latency, MixedPlan, MixedPoint, smallest_float_set
from edgewright.optimize.segments import logits_of
from edgewright.optimize.sensitivity import LayerSensitivity, noise_power, sensitivities
from edgewright.runtime.parity import compare
from mixed_network import LAYERS, network, photographs, quantizer_of

Array = NDArray[Any]

REFERENCE = np.random.default_rng(0).normal(scale=3.0, size=(200, 10)).astype(np.float32)


class MadeUpQuantizer:
    """Layers whose errors in the logits are independent, of given powers; nothing is run but a sum."""

    def __init__(self, noises: Mapping[str, float]) -> None:
        self.noises = noises
        self.layers = tuple(noises)
        self.model = network()

    def runnable(self, left_out: Mapping[str, str]) -> tuple[str, ...]:
        """What is INT8, which `logits` understands."""
        return tuple(name for name in self.layers if name not in left_out)

    def logits(self, in_int8: Sequence[str], *_: Any, **__: Any) -> Array:
        """The reference and the errors of the layers in INT8."""
        rng = {name: np.random.default_rng(index + 1) for index, name in enumerate(self.layers)}
        errors = [math.sqrt(self.noises[name]) * rng[name].normal(size=REFERENCE.shape) for name in in_int8]
        return np.asarray(REFERENCE + sum(errors), np.float32)


def layer(quantizer: MadeUpQuantizer, name: str, macs: int) -> LayerSensitivity:
    alone = compare(REFERENCE, quantizer.logits((name,)), None)
    kept = compare(REFERENCE, quantizer.logits(tuple(other for other in quantizer.layers if other != name)), None)
    return LayerSensitivity(name, "Conv", macs, alone, kept)


def searched(
    monkeypatch: pytest.MonkeyPatch,
    noises: Mapping[str, float],
    macs: Mapping[str, int],
    meets: Callable[[MixedPoint], bool],
    **options: Any,
) -> MixedPlan:
    quantizer: Any = MadeUpQuantizer(noises)
    monkeypatch.setattr(module, "logits_of", quantizer.logits)
    monkeypatch.setattr(module, "_int8_share", lambda _, left_out: _share(macs, left_out))
    found = [layer(quantizer, name, macs[name]) for name in noises]
    return smallest_float_set(quantizer, found, REFERENCE, REFERENCE, meets, **options)


def _share(macs: Mapping[str, int], left_out: Mapping[str, str]) -> float:
    return sum(work for name, work in macs.items() if name not in left_out) / sum(macs.values())


def at_least(decibels: float) -> Callable[[MixedPoint], bool]:
    return lambda point: (point.parity.sqnr_db or -math.inf) >= decibels


NOISES = {"a": 0.001, "b": 3.0, "c": 0.01, "d": 1.0, "e": 0.002, "f": 0.3, "g": 0.004, "h": 0.1}
EQUAL_WORK = dict.fromkeys(NOISES, 100)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, "b"), (2, "bd"), (3, "bdf"), (4, "bdfh"), (5, "bcdfh"), (8, "abcdefgh")]
)
def test_as_many_of_the_most_sensitive_as_are_needed(
    monkeypatch: pytest.MonkeyPatch, count: int, expected: str
) -> None:
    """The target is just what leaving out so many reaches."""
    worst = sorted(NOISES, key=lambda name: -NOISES[name])[:count]
    power = sum(noise for name, noise in NOISES.items() if name not in worst)
    target = 200.0 if count == 8 else 10 * math.log10((REFERENCE**2).mean() / power) - 0.3
    plan = searched(monkeypatch, NOISES, EQUAL_WORK, at_least(target))
    assert plan.met
    assert plan.chosen.float_layers == tuple(expected)
    assert set(plan.left_out) == set(expected)
    assert plan.before.float_layers == ()


def test_cheap_layers_go_first_and_what_a_dear_one_makes_needless_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noises = {"cheap": 0.2, "dear": 1.0, "rest": 0.05}
    macs = {"cheap": 1, "dear": 100, "rest": 100}
    power = (REFERENCE**2).mean()
    # only the dear one is enough, though the cheap one is tried before it; the dear one cannot be taken back
    plan = searched(monkeypatch, noises, macs, at_least(10 * math.log10(power / 0.3)))
    assert plan.chosen.float_layers == ("dear",)
    assert plan.chosen.int8_share == pytest.approx(101 / 201)
    plan = searched(monkeypatch, noises, macs, at_least(10 * math.log10(power / 1.15)))
    assert plan.chosen.float_layers == ("cheap",)
    # at equal cost the one that brings most
    plan = searched(monkeypatch, noises, macs, at_least(10 * math.log10(power / 1.15)), cost=lambda layer: 1.0)
    assert plan.chosen.float_layers == ("dear",)


def test_a_target_that_nothing_meets_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(monkeypatch, NOISES, EQUAL_WORK, lambda point: False)
    assert not plan.met
    assert plan.chosen.expected.loss == min(point.expected.loss for point in plan.frontier)
    assert plan.chosen.float_layers == tuple(NOISES)
    assert set(plan.left_out) == set(NOISES)


def test_of_candidates_that_lose_alike_the_one_with_most_in_int8_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(monkeypatch, dict.fromkeys(NOISES, 0.0), EQUAL_WORK, lambda point: False)
    assert not plan.met
    assert plan.chosen.float_layers == ()
    assert plan.left_out == {}


def test_without_layers_to_leave_out_the_plan_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer: Any = MadeUpQuantizer(NOISES)
    monkeypatch.setattr(module, "logits_of", quantizer.logits)
    monkeypatch.setattr(module, "_int8_share", lambda _, left_out: _share(EQUAL_WORK, left_out))
    for target, met in ((0.0, True), (100.0, False)):
        plan = smallest_float_set(quantizer, [], REFERENCE, REFERENCE, at_least(target))
        assert (plan.met, plan.chosen.float_layers, plan.left_out) == (met, (), {})


def test_each_candidate_is_run_once_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    runs: list[frozenset[str]] = []
    runnable = MadeUpQuantizer.runnable

    def noticed(self: MadeUpQuantizer, left_out: Mapping[str, str]) -> tuple[str, ...]:
        runs.append(frozenset(left_out))
        return runnable(self, left_out)

    monkeypatch.setattr(MadeUpQuantizer, "runnable", noticed)
    searched(monkeypatch, NOISES, EQUAL_WORK, at_least(25.0), progress=lambda done, total: steps.append((done, total)))
    assert len(set(runs)) == len(runs) <= 2 * 4 + len(NOISES)
    assert [done for done, _ in steps] == list(range(1, len(runs) + 1))
    assert all(done <= total for done, total in steps)


def test_what_was_left_out_before_stays_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"b": "too slow in INT8"}
    quantizer: Any = MadeUpQuantizer(NOISES)
    monkeypatch.setattr(module, "logits_of", quantizer.logits)
    monkeypatch.setattr(module, "_int8_share", lambda _, left_out: _share(EQUAL_WORK, left_out))
    found = [layer(quantizer, name, 100) for name in NOISES if name not in before]
    target = 10 * math.log10((REFERENCE**2).mean() / 0.5)
    plan = smallest_float_set(quantizer, found, REFERENCE, REFERENCE, at_least(target), left_out=before)
    assert plan.chosen.float_layers == ("d",)
    assert plan.left_out == {"b": "too slow in INT8", "d": plan.left_out["d"]}
    assert plan.left_out["d"].startswith("most sensitive of 7 layers: INT8 in it alone leaves ")


def test_reasons_name_rank_and_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(monkeypatch, NOISES, EQUAL_WORK, at_least(18.0))
    decibels = compare(REFERENCE, MadeUpQuantizer(NOISES).logits(("d",)), None).sqnr_db
    assert plan.left_out["d"] == (
        f"sensitive, number 2 of 8 layers: INT8 in it alone leaves {decibels:.1f} dB of logit SQNR"
    )
    ruined = replace(layer(MadeUpQuantizer(NOISES), "a", 1).only_quantized, sqnr_db=None)
    assert module._reason(LayerSensitivity("a", "Conv", 1, ruined, ruined), 1, 3).endswith("makes logits infinite")


def test_the_frontier_falls_in_work_and_in_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(monkeypatch, NOISES, EQUAL_WORK, at_least(25.0))
    shares = [point.int8_share for point in plan.frontier]
    noises = [noise_power(point.parity) for point in plan.frontier]
    assert shares == sorted(set(shares), reverse=True)
    assert noises == sorted(set(noises), reverse=True)
    assert plan.frontier[0] == plan.before
    assert plan.chosen in plan.frontier


def test_some_work_stays_in_int8_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers of one size: a quarter of the work is two of them; what is out of reach then is not met."""
    unmet = searched(monkeypatch, NOISES, EQUAL_WORK, at_least(90.0), least_int8=0.25)
    assert not unmet.met
    assert len(unmet.chosen.float_layers) == len(NOISES) - 2
    assert all(len(point.float_layers) <= len(NOISES) - 2 for point in unmet.frontier)
    assert searched(monkeypatch, NOISES, EQUAL_WORK, at_least(13.0), least_int8=0.25).met


def test_json_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(monkeypatch, NOISES, EQUAL_WORK, at_least(13.0))
    plan = replace(plan, chosen=replace(plan.chosen, latency=Latency(2.5, "ms", "measured")))
    content = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert content["met"] is True
    assert list(content["left_out"]) == ["b", "d"]
    assert content["chosen"] == {
        "float_layers": ["b", "d"],
        "int8_share": 0.75,
        "images": 200,
        "agreement": plan.chosen.parity.agreement,
        "sqnr_db": plan.chosen.parity.sqnr_db,
        "expected_flips": plan.chosen.expected.share,
        "expected_loss": plan.chosen.expected.loss,
        "latency": {"value": 2.5, "unit": "ms", "kind": "measured"},
    }
    assert content["before"]["latency"] is None


def test_a_real_network_against_all_of_its_sets() -> None:
    x = photographs(48)
    quantizer = quantizer_of("cpu")
    reference = logits_of(network(), x, threads=1)
    found = sensitivities(quantizer, reference, x, threads=1)
    sets = {
        names: compare(reference, logits_of(quantizer.runnable(dict.fromkeys(names, "a set")), x, threads=1), None)
        for count in range(4)
        for names in itertools.combinations(LAYERS, count)
    }
    target = max(parity.sqnr_db or 0.0 for names, parity in sets.items() if len(names) == 2) - 0.1

    def meets(point: MixedPoint) -> bool:
        return (point.parity.sqnr_db or 0.0) >= target

    plan = smallest_float_set(quantizer, found, reference, x, meets, cost=lambda layer: 1.0, threads=1)
    assert plan.met
    assert len(plan.chosen.float_layers) == min(
        len(names) for names, parity in sets.items() if (parity.sqnr_db or 0.0) >= target
    )
    assert plan.chosen.parity == replace(sets[plan.chosen.float_layers], source="simulation")
    work = {layer.node: layer.macs for layer in found}
    gate = 16 * 4 * 2
    expected = sum(work[name] for name in LAYERS if name not in plan.left_out) / (sum(work.values()) + gate)
    assert plan.chosen.int8_share == pytest.approx(expected)
    again = smallest_float_set(quantizer, found, reference, x, meets, cost=lambda layer: 1.0, threads=1)
    assert again == plan
