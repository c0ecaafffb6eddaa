"""A model whose engines are built and judged one at a time, for tests: what the fixture `edgewright_build` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import click

from edgewright.cli_options import pipeline_options, run_options
from edgewright.outcome import EngineRow
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.errors import BuildError
from edgewright.verdict_report import evidence_lines

__all__ = ["BuiltModel", "built_model"]


def built_model(model: str, **options: Any) -> BuiltModel:
    """A model of any source: a name, "FILE.py:FACTORY", "FILE.onnx", as on the command line.

    Keywords are the options of `edgewright engine`, such as `calibration="DIR"`, `max_drop=0.5`, `input_shape=(3, 64,
    64)`, `rescue=False`; a mapping repeats an option, as in `option={"width": 2}`. INT8 is wherever it can be unless
    `placement="measured"` is said: what a clock decides beside other tests differs from run to run.
    Raises `click.UsageError` for what the command refuses.
    """
    command = click.command("engine")(run_options(lambda **arguments: None))
    words = _words({"placement": "rules", **options}, command)
    arguments = dict(command.make_context("engine", [model, *words]).params)
    del arguments["as_json"]
    return BuiltModel(pipeline_options(**arguments))


def _words(options: Mapping[str, Any], command: click.Command) -> Iterator[str]:
    """The options as they are written on the command line; None is not written, nor a flag that is not wanted."""
    known = {option.name: option for option in command.params if isinstance(option, click.Option)}
    for name, value in options.items():
        words = name.replace("_", "-")
        if value is False and name in known:
            if known[name].secondary_opts:  # a flag without a --no-… is off unless it is written
                yield f"--no-{words}"
        elif isinstance(value, bool):
            yield f"--{words}"
        elif isinstance(value, Mapping):
            for each in value.items():
                yield f"--{words}={'='.join(map(str, each))}"
        elif value is not None:
            yield f"--{words}={','.join(map(str, value)) if isinstance(value, tuple | list) else value}"


class BuiltModel:
    """Builds an engine, and runs it beside PyTorch on the evaluation images, when it is first asked for.

    Engines are not timed: a test that runs beside others would measure those.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._rows: dict[tuple[str, str, str | None], EngineRow] = {}

    def row(self, backend: str, precision: str, target: str | None = None) -> EngineRow:
        """The judged row of one engine, for a GPU that of the first target unless one is named.

        Raises `EdgewrightError` where a stage fails.
        """
        key = backend, precision, target
        if key not in self._rows:
            self._rows[key] = self._judged(*key)
        return self._rows[key]

    def assert_parity(
        self, backend: str, precision: str, target: str | None = None, *, allow_inconclusive: bool = False
    ) -> EngineRow:
        """Passes if the engine runs here and is within the gates; returns its row.

        Skips the test with the reason where the engine cannot be run here, or need not be built. Raises
        `AssertionError` with the verdict and the numbers if it is not within the gates, or its build failed.
        """
        row = self.row(backend, precision, target)
        if row.status == "verified" or (row.status == "undecided" and allow_inconclusive):
            return row
        if row.status in ("skipped", "built_not_run") or (row.status == "simulated" and row.reason_code != "fail"):
            import pytest

            pytest.skip(f"{row.name}: {row.reason}")
        lines = [] if row.parity is None else evidence_lines(row.parity, row.figures)
        raise AssertionError("\n".join([f"{row.name}: {row.reason}", *lines]))

    def _judged(self, backend: str, precision: str, target: str | None) -> EngineRow:
        asked: dict[str, Any] = {"backends": (backend,), "precisions": (precision,)}
        if backend in BACKENDS and BACKENDS[backend].targets:
            asked["targets"] = (target or self._options.targets[0],)
        pipeline = Pipeline(replace(self._options, **asked))
        with pipeline.workspace.locked():
            rows = [row for row in pipeline.judged if target in (None, row.target)]
        if not rows:
            raise BuildError(f"{backend} has no {precision} engine", "choose another precision or target")
        return rows[0]
