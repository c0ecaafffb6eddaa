"""The fixture `edgewright_build` in a pytest of its own, with the example of docs/testing.md; and runs without it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest

from edgewright import built_model as built_model_module
from edgewright.built_model import built_model
from edgewright.outcome import EngineRow, Outcome
from edgewright.runtime.errors import BuildError, DataError
from edgewright.runtime.gates import MaxDrop, MinRatio, MinSqnr
from tiny_network import LABELS

DOCUMENT = Path(__file__).parents[1] / "docs" / "testing.md"
INSTALLED = bool(metadata.entry_points(group="pytest11", name="edgewright"))  # not where an older version is
PLUGIN = () if INSTALLED else ("-p", "edgewright.pytest_plugin")


def documented(name: str) -> str:
    """The code of the document that begins with a comment of this file's name."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"# {name}\n"))
    return block


def test_the_example_of_the_document(pytester: pytest.Pytester, images: Any) -> None:
    """As it stands there, on the images of this test; in a process of its own, as onnx cannot be imported twice."""
    for name in ("net.py", "test_net.py"):
        pytester.makefile(".py", **{name.removesuffix(".py"): documented(name)})
    (pytester.path / "labels.txt").write_text("\n".join(LABELS))
    (pytester.path / "images").symlink_to(images.calibration.parent)
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=2)
    (built,) = (pytester.path / ".pytest_cache" / "d" / "edgewright").iterdir()
    assert {path.stem for path in (built / "engines").glob("*.onnx")} == {"onnxruntime-fp32", "onnxruntime-int8"}


def test_a_run_without_the_fixture_imports_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n"
        "def test_nothing():\n"
        "    ours = {name for name in sys.modules if name.startswith('edgewright')}\n"
        "    assert ours == {'edgewright', 'edgewright.pytest_plugin'}\n"
        "    assert not {'torch', 'onnx', 'numpy', 'click'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout


# --- A model whose engines are built one at a time ---------------------------------------------------------------


@pytest.fixture
def options(build_dir: Path, images: Any) -> dict[str, Any]:
    """Of the tiny network in the test's copy of the finished build folder."""
    return {"build_dir": build_dir, "calibration": images.calibration, "evaluation": images.evaluation, "max_drop": 8}


def test_a_row_is_that_of_a_whole_run(options: dict[str, Any], outcome: Outcome) -> None:
    model = built_model("tiny", **options)
    row = model.assert_parity("onnxruntime", "int8", allow_inconclusive=True)
    (whole,) = (each for each in outcome.rows if each.precision == "int8")
    assert (row.parity, row.verdict, row.status) == (whole.parity, whole.verdict, whole.status)
    assert row.latency is None, "nothing is timed"
    assert model.row("onnxruntime", "int8") is row, "nothing is judged twice"


def test_what_is_not_within_the_gates_fails_with_the_numbers(options: dict[str, Any]) -> None:
    model = built_model("tiny", **options, min_sqnr=90)
    with pytest.raises(AssertionError) as failed:
        model.assert_parity("onnxruntime", "int8")
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("onnxruntime int8: FAIL: SQNR of the logits ")
    assert any(line.startswith("  top-1 ") for line in lines)


def test_too_few_images_fail_unless_they_may(options: dict[str, Any]) -> None:
    model = built_model("tiny", **options | {"max_drop": 8, "min_agreement": 0.97})
    with pytest.raises(AssertionError, match="INCONCLUSIVE: about"):
        model.assert_parity("onnxruntime", "fp32")
    assert model.assert_parity("onnxruntime", "fp32", allow_inconclusive=True).status == "undecided"


def test_what_cannot_run_here_is_skipped(options: dict[str, Any]) -> None:
    with pytest.raises(pytest.skip.Exception, match="tensorrt fp16: "):
        built_model("tiny", **options).assert_parity("tensorrt", "fp16")


@pytest.mark.parametrize(("code", "error"), [("pass", pytest.skip.Exception), ("fail", AssertionError)])
def test_a_simulation_can_only_fail(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: str, error: type[BaseException]
) -> None:
    row = EngineRow("tensorrt-rtx", "int8", "sm86", "simulated", code, "its numerics were simulated")
    model = built_model("tiny", **options)
    monkeypatch.setattr(model, "row", lambda *asked: row)
    with pytest.raises(error, match="tensorrt-rtx int8 sm86: its numerics were simulated"):
        model.assert_parity("tensorrt-rtx", "int8")


def test_keywords_are_the_options_of_the_command() -> None:
    found = built_model(
        "tiny",
        min_ratio=0.99,
        max_drop=2,
        rescue=False,
        target="sm89",
        option={"width": 2, "kind": "a"},
        seed=None,
        min_sqnr=-5,
    )._options
    assert found.gates == (MaxDrop(0.02), MinRatio(0.99), MinSqnr(-5))
    assert (found.rescue, found.targets, found.model_options, found.seed) == (
        False,
        ("sm89",),
        {"width": 2, "kind": "a"},
        21,
    )
    shape = built_model("tiny", input_shape=(3, 64, 64), mean=[0.5], labels=DOCUMENT)._options.completion
    assert (shape.input_shape, shape.mean) == ((3, 64, 64), (0.5,))


def test_flags_that_are_not_wanted_are_not_written() -> None:
    assert built_model("tiny", allow_overlap=False)._options == built_model("tiny")._options
    assert not built_model("tiny", rescue=False)._options.rescue
    with pytest.raises(click.NoSuchOption, match="--resuce"):
        built_model("tiny", resuce=False)


def test_without_a_target_the_first_is_built(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def pipeline(options: Any) -> None:
        asked.append(options.targets)
        raise BuildError("stopped")

    monkeypatch.setattr(built_model_module, "Pipeline", pipeline)
    model = built_model("tiny", **options, target="sm86,sm120")
    for backend, target in (("tensorrt-rtx", None), ("tensorrt-rtx", "sm120"), ("onnxruntime", None)):
        with pytest.raises(BuildError):
            model.row(backend, "fp16", target)
    assert asked == [("sm86",), ("sm120",), ("sm86", "sm120")]


def test_a_cache_that_cannot_be_written_is_done_without(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(edgewright_build):\n    assert callable(edgewright_build)\n")
    done = pytester.runpytest_subprocess("-o", "cache_dir=/proc/nothing", "-W", "ignore", *PLUGIN)
    done.assert_outcomes(passed=1)


@pytest.mark.parametrize("wrong", [{"max_dorp": 1}, {"max_drop": 101}, {"method": "magic"}, {"input_shape": (3, 64)}])
def test_keywords_that_are_no_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(click.UsageError):
        built_model("tiny", **wrong)


def test_what_cannot_be_judged_is_refused(options: dict[str, Any], images: Any) -> None:
    with pytest.raises(DataError, match="does not exist"):
        built_model("tiny", **options | {"evaluation": images.evaluation / "none"}).row("onnxruntime", "fp32")
