"""5,000 corrupted bundles, in both forms, signed and not: what is accepted, what is not caught, what takes long."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from figures import ROOT, Figure

sys.path.append(str(ROOT / "tests" / "support"))

from corrupt import attacked
from edgewright.runtime.bundle import write_key_pair
from toy_bundle import toy_bundle

CASES = 5000


def measure() -> Iterator[Figure]:
    """How many were accepted or not caught, and the slowest refusal in seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = write_key_pair(folder / "pair")
        attacks = []
        for signed in (False, True):
            bundle = toy_bundle(folder / f"signed-{signed}.bundle", signing_key=keys.private if signed else None)
            scratch = folder / f"scratch-{signed}"
            scratch.mkdir()
            required = keys.public if signed else None
            attacks.append(attacked(bundle, scratch, CASES // 2, seed=21 + signed, require_signature=required))
    note = f"of {sum(attack.refused for attack in attacks)} refused"
    yield Figure("corrupted bundles accepted", sum(len(attack.accepted) for attack in attacks), "", 0, note=note)
    yield Figure("corrupted bundles, uncaught exceptions", sum(len(attack.uncaught) for attack in attacks), "", 0)
    yield Figure("corrupted bundles, slowest refusal", max(attack.slowest for attack in attacks), "s", 2.0)
