"""How fast engines are: measured in turns, compared in pairs, with the machine and its clocks beside the figures."""

from __future__ import annotations

from .bench import Bench, bench, read_bench
from .candidates import Candidate, Selection, baseline_of, bytes_of_file, candidates_of, selections_for
from .comparing import Comparison
from .results import Distribution, Machine, Result, SetUp

__all__ = [
    "Bench",
    "Candidate",
    "Comparison",
    "Distribution",
    "Machine",
    "Result",
    "Selection",
    "SetUp",
    "baseline_of",
    "bench",
    "bytes_of_file",
    "candidates_of",
    "read_bench",
    "selections_for",
]
