"""All figures side by side in one run: `make bench`, or `python benchmarks/run.py lite0 device`."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from figures import ROOT, Figure
from rich.console import Console
from rich.table import Table

from edgewright.workspace import machine

BENCHMARKS = (
    "device",
    "bundle_fuzz",
    "engine",
    "lite0",
    "b0",
    "stress",
    "rtx",
    "openvino_int8",
    "latency",
    "overview",
    "memory",
    "fold",
)
RESULT = ROOT / "build" / "bench.json"


def main(names: list[str]) -> int:
    """Runs the benchmarks in `names`, or all; 1 if a bound is not kept."""
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
        return 2
    figures: list[Figure] = []
    for name in names or BENCHMARKS:
        print(f"{name} …", flush=True)
        for figure in importlib.import_module(name).measure():
            figures.append(figure)
            print(f"  {figure.name}: {figure.value:.4g} {figure.unit}", flush=True)
    Console(width=110).print(_table(figures))
    if not names:  # a part of the figures does not replace them all
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(_document(figures), indent=1) + "\n")
    return int(any(figure.holds is False for figure in figures))


def _table(figures: list[Figure]) -> Table:
    table = Table(title=machine(), title_justify="left")
    for heading in ("figure", "measured", "bound", "kept", "note"):
        table.add_column(heading)
    for figure in figures:
        sign = "≥" if figure.at_least else "≤"
        bound = "" if figure.bound is None else f"{sign} {figure.bound:.4g}"
        kept = {True: "yes", False: "NO", None: ""}[figure.holds]
        table.add_row(figure.name, f"{figure.value:.4g} {figure.unit}", bound, kept, figure.note)
    return table


def _document(figures: list[Figure]) -> dict[str, object]:
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "figures": [asdict(figure) for figure in figures],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
