"""The runtime as a folder that was copied into somebody's product, under another name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import edgewright.runtime

PROGRAM = """
import json, sys
from pathlib import Path
from product.vision.device.build import BuildOptions, build_bundle
from product.vision import Session
report = build_bundle(Path(sys.argv[1]), BuildOptions(backends=("onnxruntime",)), cache=Path(sys.argv[2]))
with Session.open(sys.argv[1], cache=Path(sys.argv[2])) as session:
    why = session.why
ours = [name for name in sys.modules if name.startswith("edgewright")]
print(json.dumps([[row.status for row in report.rows], [row.reason for row in report.rows], why, ours]))
"""


def test_a_copied_runtime_builds_in_processes_of_its_own(bundle: Path, device_cache: Path, tmp_path: Path) -> None:
    source = Path(edgewright.runtime.__file__).resolve().parent
    target = tmp_path / "app" / "product" / "vision"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target.parent / "__init__.py").write_text("")
    (tmp_path / "app" / "main.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "app" / "main.py", bundle, device_cache],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses, reasons, why, ours = json.loads(done.stdout)
    assert statuses == ["verified"], reasons
    assert "proven here" in why
    assert ours == []
