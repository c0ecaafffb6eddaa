"""Two networks have the same fingerprint when, and only when, they compute the same: also in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgewright.export.completion import Completion
from edgewright.export.entries import InputShape
from edgewright.export.factories import factory_source
from edgewright.export.fingerprints import network_fingerprint
from edgewright.export.resolve import ModelRequest
from user_files import SOURCE, Written, source_of, write_factory


class Scaled(nn.Module):
    """Multiplies by an attribute that no tensor, repr() or source file tells of."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale  # type: ignore[no-any-return]


class Plain:
    """An object whose repr() is its address."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return partial(write_factory, tmp_path)


def fingerprint(model: nn.Module, shape: InputShape | None = None) -> str:
    return network_fingerprint(model, {__name__: Path(__file__)}, {}, shape)


def around(inner: float) -> Callable[[float], float]:
    return lambda x: x + inner


def knotted(value: float) -> list[Any]:
    knot: list[Any] = [value]
    knot.append(knot)
    return knot


VALUES: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "number": (lambda: 1.0, lambda: 5.0),
    "whole and real number": (lambda: 1, lambda: 1.0),
    "text": (lambda: "relu", lambda: "gelu"),
    "nothing": (lambda: None, lambda: False),
    "tensor": (lambda: torch.ones(2), lambda: torch.zeros(2)),
    "shape": (lambda: torch.ones(2, 3), lambda: torch.ones(3, 2)),
    "type": (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.int32)),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda: (2 * torch.eye(2)).to_sparse()),
    "array": (lambda: np.ones(2000), lambda: np.concatenate([np.ones(1000), np.zeros(1), np.ones(999)])),
    "array of objects": (lambda: np.array([None, "a"]), lambda: np.array([None, "b"])),
    "nested": (lambda: {"a": [1, (2, 3)]}, lambda: {"a": [1, (2, 4)]}),
    "set": (lambda: {"a", "b", "c"}, lambda: {"a", "b", "d"}),
    "dtype": (lambda: torch.float32, lambda: torch.float16),
    "device": (lambda: torch.device("cpu"), lambda: torch.device("cuda")),
    "function": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "function of a library": (lambda: torch.relu, lambda: torch.sigmoid),
    "called function": (lambda: lambda x: torch.relu(x), lambda: lambda x: torch.sigmoid(x)),
    "closure": (lambda: around(1.0), lambda: around(2.0)),
    "partial": (lambda: partial(torch.mul, other=1), lambda: partial(torch.mul, other=2)),
    "object with words": (lambda: SimpleNamespace(a=1), lambda: SimpleNamespace(a=2)),
    "object of one's own": (lambda: Plain(1), lambda: Plain(2)),
    "bound method": (lambda: Scaled(1.0).forward, lambda: Scaled(2.0).forward),
    "network in a list": (lambda: [Scaled(1.0)], lambda: [Scaled(2.0)]),
    "itself": (lambda: knotted(1.0), lambda: knotted(2.0)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_an_attribute_counts_by_its_content(kind: str) -> None:
    first, second = VALUES[kind]
    assert fingerprint(Scaled(first())) == fingerprint(Scaled(first()))
    assert fingerprint(Scaled(first())) != fingerprint(Scaled(second()))


def test_an_attribute_deep_inside_counts() -> None:
    assert fingerprint(nn.Sequential(nn.ReLU(), Scaled(1.0))) != fingerprint(nn.Sequential(nn.ReLU(), Scaled(2.0)))


def test_which_of_two_values_is_meant_counts() -> None:
    one, two = [1], [2]
    assert fingerprint(Scaled([one, two, one])) != fingerprint(Scaled([one, two, two]))


def test_a_hook_counts_and_training_and_addresses_do_not() -> None:
    plain, hooked = nn.ReLU(), nn.ReLU()
    before = fingerprint(plain)
    assert fingerprint(plain.train()) == before == fingerprint(nn.ReLU().eval())
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    assert fingerprint(hooked) != before
    assert fingerprint(Scaled(object())) == fingerprint(Scaled(object()))


# Outputs

FACTOR = [1.0]


class Outside(nn.Module):
    """Multiplies by what stands in no attribute; remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        self.calls += 1
        print("never")
        return self.norm(x) * FACTOR[0]  # type: ignore[no-any-return]


def test_outputs_count_where_the_input_shape_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown, known = fingerprint(Outside()), fingerprint(Outside(), (1, 4, 4))
    assert fingerprint(Outside(), (1, 4, 4)) == known
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", [5.0])
    assert fingerprint(Outside(), (1, 4, 4)) != known
    assert fingerprint(Outside()) == unknown


def test_a_network_stays_as_it_is_but_for_its_mode() -> None:
    model = Outside().train()
    state, threads, mean = torch.get_rng_state(), torch.get_num_threads(), model.norm.running_mean
    fingerprint(model, (1, 4, 4))
    assert not model.training
    assert model.kept == []
    assert model.calls.item() == 0
    assert mean is not None
    assert mean.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_does_not_count() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 28 * 28, 1000))
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint(model, (3, 32, 32)))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 0, 4)])
def test_a_network_that_does_not_run_has_one_too(shape: InputShape) -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    assert fingerprint(Raising(), shape) == fingerprint(Raising(), None)


PROCESS = """
import torch
from pathlib import Path
from edgewright.export.fingerprints import network_fingerprint
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.code, self.any = {"ab", "cd", "ef"}, lambda x: x in {"a", "b", "c"}, object()
        self.register_forward_hook(lambda *_: None)
        self.table = {torch.float32: frozenset(("x", "y", "z"))}
    def forward(self, x): return x + 1
print(network_fingerprint(Net(), {"__main__": Path(torch.__file__)}, {"b": 1}, (1, 4, 4)))
"""


def test_every_process_gives_the_same() -> None:
    """Also where texts hash in another order."""
    running = [
        subprocess.Popen(
            (sys.executable, "-c", PROCESS),
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in running)
    assert first.startswith("sha256:")
    assert first == second


# Of what a factory gives


def given(path: Path, name: str = "make", **options: Any) -> str:
    found: str = source_of(f"{path}:{name}", **options).fingerprint
    return found


BLOCK = "from torch import nn\nclass Block(nn.Module):\n  def forward(self, x): return x + {}"
MAKE = (
    "from blocks import Block\ndef make(bias=1.0, stride=1, **rest):\n  import torch\n  model = nn.Sequential(Block(), "
)
MAKE += "nn.Conv2d(1, 1, 1, stride))\n  nn.init.constant_(model[1].bias, bias)\n  return model"


def test_fingerprints_differ_when_and_only_when_something_does(written: Written, tmp_path: Path) -> None:
    blocks = tmp_path / "blocks.py"
    blocks.write_text(BLOCK.format(1))
    (tmp_path / "unused.py").write_text("")
    path = written(MAKE)
    first = given(path)
    (tmp_path / "unused.py").write_text("1")
    path.touch()
    assert given(path) == first
    found = [first, given(path, bias=2.0), given(path, stride=2), given(path, word="other")]
    blocks.write_text(BLOCK.format(2))  # the code of a class
    found.append(given(path))
    path.write_text(path.read_text() + "# ")  # the factory's own file
    found.append(given(path))
    assert len(set(found)) == len(found)
    blocks.write_text(BLOCK.format(1))
    path.write_text(SOURCE + MAKE)
    assert given(path) == first


def test_a_helper_counts_that_no_class_comes_from(written: Written, tmp_path: Path) -> None:
    (tmp_path / "scaling.py").write_text("def scaled(x): return x * 1.0")
    path = written("import scaling\nclass make(nn.Module):\n  def forward(self, x): return scaling.scaled(x)")
    first = given(path)
    (tmp_path / "scaling.py").write_text("def scaled(x): return x * 2.0")
    assert given(path) != first


def test_an_attribute_and_what_only_outputs_tell_count(written: Written, tmp_path: Path) -> None:
    scale = tmp_path / "scale.txt"
    path = written(
        f"from pathlib import Path\nSCALE = lambda: float(Path({str(scale)!r}).read_text())\n"
        "class Kept(nn.Module):\n"
        "  def __init__(self): super().__init__(); self.scale = SCALE()\n"
        "  def forward(self, x): return x * self.scale\n"
        "class Read(nn.Module):\n  def forward(self, x): return x * SCALE()\n"
        "def make(): return ModelSource(build=Read, preprocess=GREY)"
    )
    found = []
    for value in ("1.0", "5.0"):
        scale.write_text(value)
        completed = ModelRequest(f"{path}:Read", completion=Completion(input_shape=(1, 4, 4)))
        found.append((given(path, "Kept"), given(path), factory_source(completed).fingerprint))
    assert all(before != after for before, after in zip(*found, strict=True))


@pytest.mark.parametrize("lazily", [False, True])
def test_a_helper_in_another_folder_counts(written: Written, tmp_path: Path, lazily: bool) -> None:
    helper = tmp_path / "shared" / "far_helper.py"
    helper.parent.mkdir()
    lines = f"import sys\nsys.path.append({str(helper.parent)!r})\n"
    call = "def make():\n  import far_helper\n" if lazily else "import far_helper\ndef make():\n"
    path = written(f"{lines}{call}  return nn.Linear(far_helper.WIDTH, 1)", "own/net.py")
    prints, paths = [], list(sys.path)
    for width in ("2 # wide", "2", "3"):
        helper.write_text(f"WIDTH = {width}")
        prints.append(given(path))
        sys.path[:] = paths
    assert len(set(prints)) == 3
    assert source_of(f"{path}:make").module().in_features == 3
    sys.path[:] = paths


def test_a_helper_of_the_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory, helper = tmp_path / "own_package" / "nets" / "tiny.py", tmp_path / "own_package" / "common" / "ops.py"
    for file, content in ((factory, "from ..common.ops import make"), (helper, "from torch.nn import ReLU as make")):
        file.parent.mkdir(parents=True)
        file.write_text(content)
    monkeypatch.chdir(tmp_path)
    try:
        first = source_of("own_package.nets.tiny:make").fingerprint
        helper.write_text("from torch.nn import ReLU as make  # again")
        assert source_of("own_package.nets.tiny:make").fingerprint != first
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
            del sys.modules[name]


def test_a_base_class_elsewhere_counts(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library" / "fingerprinted_base.py"
    library.parent.mkdir()
    library.write_text(BLOCK.format(1))
    monkeypatch.syspath_prepend(str(library.parent))
    path = written(
        "from fingerprinted_base import Block\nclass Net(Block): ...\ndef make(): return Net()", "own/net.py"
    )
    try:
        first = given(path)
        library.write_text(BLOCK.format(2))
        assert given(path) != first
    finally:
        sys.modules.pop("fingerprinted_base", None)


@pytest.mark.parametrize(
    "buffer", ["'b', torch.tensor({}), persistent=False", "'b', torch.tensor({}, dtype=torch.bfloat16)"]
)
def test_every_buffer_counts(written: Written, buffer: str) -> None:
    lines = "import torch\ndef make(value=1.0):\n  m = nn.Identity(); m.register_buffer(" + buffer.format("value")
    path = written(lines + "); return m")
    prints = {value: given(path, name="make", value=value) for value in (1.0, 2.0)}
    assert prints[1.0] != prints[2.0]


def test_a_network_of_a_library_alone(written: Written) -> None:
    """Its classes' addresses are no part of it, and its files are known by their version."""
    path = written("from functools import partial\ndef make(): return nn.Sequential(nn.SiLU(), nn.Linear(2, 2))")
    assert given(path) == given(path)
