"""The minimum cut beside trying all choices."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest

from edgewright.optimize.placement_choice import Crossing, cheapest


def benefit(chosen: Collection[str], gains: Mapping[str, float], crossings: Sequence[Crossing]) -> float:
    """What the choice saves, straight from the definition."""
    total = sum(gains[node] for node in chosen)
    for crossing in crossings:
        readers = {reader in chosen for reader in crossing.readers}
        if crossing.producer in chosen and False in readers:
            total -= crossing.to_float
        if crossing.producer not in chosen and True in readers:
            total -= crossing.to_int8
    return total


def best_by_trying(gains: Mapping[str, float], crossings: Sequence[Crossing]) -> float:
    choices = itertools.chain.from_iterable(itertools.combinations(gains, k) for k in range(len(gains) + 1))
    return max(benefit(choice, gains, crossings) for choice in choices)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_as_good_as_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"n{index}" for index in range(int(rng.integers(1, 9)))]
    gains = {name: float(rng.integers(-8, 9)) for name in names}
    crossings = []
    for index, name in enumerate(names[:-1]):
        later = names[index + 1 :]
        readers = tuple(rng.choice(later, size=int(rng.integers(1, min(3, len(later)) + 1)), replace=False).tolist())
        crossings.append(Crossing(name, readers, *(float(cost) for cost in rng.integers(0, 6, 2))))
    chosen = cheapest(gains, crossings)
    assert chosen <= set(gains)
    assert benefit(chosen, gains, crossings) == best_by_trying(gains, crossings)


def test_a_node_that_loses_is_taken_along_between_two_that_gain() -> None:
    gains = {"a": 5.0, "b": -1.0, "c": 5.0}
    crossings = [Crossing("a", ("b",), 2.0, 2.0), Crossing("b", ("c",), 2.0, 2.0)]
    assert cheapest(gains, crossings) == {"a", "b", "c"}
    assert cheapest(gains, [Crossing("a", ("b",), 0.0, 0.0)]) == {"a", "c"}


def test_a_node_that_gains_less_than_its_conversions_stays_float() -> None:
    gains = {"a": -9.0, "b": 1.0, "c": -9.0}
    crossings = [Crossing("a", ("b",), 0.6, 0.6), Crossing("b", ("c",), 0.6, 0.6)]
    assert cheapest(gains, crossings) == frozenset()


def test_a_tensor_is_converted_once_however_many_read_it() -> None:
    gains = {"a": -9.0, "b": 1.0, "c": 1.0}
    assert cheapest(gains, [Crossing("a", ("b", "c"), 1.5, 0.0)]) == {"b", "c"}
    assert cheapest(gains, [Crossing("a", ("b",), 1.5, 0.0), Crossing("a", ("c",), 1.5, 0.0)]) == frozenset()


def test_nothing_gained_and_nothing_lost_stays_float() -> None:
    assert cheapest({"a": -1.0, "b": 1.0}, [Crossing("a", ("b",), 1.0, 0.0)]) == frozenset()  # three ways give 0
    assert cheapest({"a": 0.0}, []) == cheapest({}, []) == frozenset()
