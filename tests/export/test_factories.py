"""A person's own function gives the network: found, called, checked, and identified by all it depends on."""

from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgewright.export.factories import check_one_input
from edgewright.export.reference import torch_reference
from edgewright.export.resolve import resolve
from edgewright.export.user_code import own_modules
from edgewright.runtime.errors import DataError, EdgewrightError, ModelError
from edgewright.runtime.preprocess import Preprocess
from user_files import Written, source_of, write_factory

GREY = Preprocess((4, 4), None, (0.5,), (0.5,), colour="L")


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return partial(write_factory, tmp_path)


def refusal(model: object, weights: str = "default", **options: Any) -> str:
    """The one line that is said about it."""
    with pytest.raises(ModelError) as caught:
        source_of(model, weights, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a factory gives


def test_a_module(written: Written) -> None:
    path = written("")
    source = source_of(f"{path}:net")
    model = source.module()
    assert isinstance(model[1], nn.Linear)
    assert not model.training
    assert (source.name, source.weights) == (f"{path}:net", "as net gives them")
    assert source.note == "the weights are what net gives"
    assert (source.preprocess, source.input_shape, source.labels, source.data) == (None, None, None, None)


def test_a_class_is_a_factory(written: Written) -> None:
    path = written("class Net(nn.Linear):\n  def __init__(self, size=2): super().__init__(size, size)")
    assert source_of(f"{path}:Net", size=5).module().in_features == 5


def test_options_are_its_keyword_arguments(written: Written) -> None:
    path = written("def make(*, classes, **rest): return net(classes + rest['more'])")
    assert source_of(f"{path}:make", classes=4, more=3).module()[1].out_features == 7


def test_a_source_says_more(written: Written) -> None:
    path = written("def make(): return ModelSource(build=net, preprocess=GREY, labels=('a','b','c'), note='of mine')")
    source = source_of(f"{path}:make")
    assert (source.preprocess, source.input_shape, source.labels) == (GREY, (1, 4, 4), ("a", "b", "c"))
    assert source.note == "of mine; the weights are what make gives"
    assert source.name == f"{path}:make"


def test_it_is_called_once(written: Written) -> None:
    path = written(
        "calls = []\n"
        "def build(): calls.append('build'); return net()\n"
        "def make(): calls.append('make'); return ModelSource(build=build)\n"
        "def count(): return nn.Linear(1, len(calls))"
    )
    source = source_of(f"{path}:make")
    assert source.module() is source.module()
    module = sys.modules[source.build.__globals__["__name__"]]
    assert module.__name__ == "edgewright.export.factories"
    (made,) = [module for module in sys.modules.values() if getattr(module, "__file__", None) == str(path)]
    assert made.calls == ["make", "build"]


def test_random_weights_are_the_same_each_time_and_the_generator_is_left_alone(written: Written) -> None:
    path = written("import torch\ntorch.rand(3)\ndef make(): return ModelSource(build=net)")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = (source_of(f"{path}:net") for _ in range(2))
    lazily = source_of(f"{path}:make")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    third = source_of(f"{path}:net")
    for other in (second, third, lazily):
        assert torch.equal(first.module()[1].weight, other.module()[1].weight)
    assert first.fingerprint == second.fingerprint == third.fingerprint


# Where it is found


def test_neighbours_are_importable_also_when_it_is_called(written: Written, tmp_path: Path) -> None:
    (tmp_path / "widths.py").write_text("WIDTH = 6")
    (tmp_path / "later.py").write_text("DEPTH = 2")
    path = written("import widths\ndef make():\n  import later\n  return nn.Linear(widths.WIDTH, later.DEPTH)")
    paths = list(sys.path)
    model = source_of(f"{path}:make").module()
    assert (model.in_features, model.out_features) == (6, 2)
    assert sys.path == paths


def test_neighbours_of_two_files_may_have_the_same_name(written: Written, tmp_path: Path) -> None:
    for folder, width in (("a", 3), ("b", 4)):
        path = written("import widths\ndef make(): return nn.Linear(widths.WIDTH, 1)", f"{folder}/net.py")
        (path.parent / "widths.py").write_text(f"WIDTH = {width}")
    assert [source_of(f"{tmp_path / name / 'net.py'}:make").module().in_features for name in "aba"] == [3, 4, 3]


def test_the_modules_of_others_stay_as_they_are(written: Written, tmp_path: Path) -> None:
    """A neighbour called as a library that is loaded already does not replace it, as in `python file.py`."""
    (tmp_path / "json.py").write_text("raise RuntimeError")
    source_of(f"{written('import json')}:net")
    assert sys.modules["json"] is json


def test_relative_and_absolute_files(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("", "inner/net.py")
    monkeypatch.chdir(tmp_path)
    relative = source_of("inner/net.py:net")
    monkeypatch.chdir(path.parent)
    assert source_of("net.py:net").fingerprint == relative.fingerprint == source_of(f"{path}:net").fingerprint


def test_a_folder_with_a_colon(written: Written) -> None:
    assert source_of(f"{written('', 'a:b/net.py')}:net").module()


def test_a_module_in_the_current_folder(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("", "own_networks/small.py")
    monkeypatch.chdir(tmp_path)
    try:
        assert source_of("own_networks.small:net").module()[1].out_features == 3
    finally:
        sys.modules.pop("own_networks.small", None)
        sys.modules.pop("own_networks", None)
    assert str(tmp_path) not in sys.path


def test_an_installed_module() -> None:
    assert isinstance(source_of("torch.nn:Identity").module(), nn.Identity)


def test_dataclasses_and_pickle_find_their_module(written: Written) -> None:
    path = written(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Width:\n  value: 'int' = 16\n"
        "class Net(nn.Module):\n"
        "  def __init__(self): super().__init__(); self.width = Width()"
    )
    model = source_of(f"{path}:Net").module()
    assert pickle.loads(pickle.dumps(model)).width == model.width


def test_no_bytecode_is_left(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "widths.py").write_text("WIDTH = 6")
    source_of(f"{written('import widths')}:net")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.py", "widths.py"]
    assert not sys.dont_write_bytecode


def test_the_arguments_of_this_process_are_not_for_the_file(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["edgewright", "optimize", "--int8"]
    monkeypatch.setattr(sys, "argv", arguments)
    lines = (
        "import argparse, sys\n"
        "parser = argparse.ArgumentParser(); parser.add_argument('--width', type=int, default=5)\n"
        "WIDTH = parser.parse_args().width\n"
        "def make(): assert sys.argv == [__file__]; return nn.Linear(WIDTH, 1)"
    )
    assert source_of(f"{written(lines)}:make").module().in_features == 5
    assert sys.argv is arguments
    required = written(lines.replace("default=5", "required=True"))
    assert "cannot be imported: SystemExit: 2" in refusal(f"{required}:make")
    assert sys.argv is arguments


def test_what_it_prints_does_not_go_to_stdout(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        "print('import')\n"
        "class Net(nn.Flatten):\n  def forward(self, x): print('forward'); return super().forward(x)\n"
        "def build(): print('build'); return Net()\n"
        "def names(): print('labels'); return ['a'] * 16\n"
        "def make(): print('call'); return ModelSource(build=build, preprocess=GREY, labels=names)"
    )
    torch_reference(source_of(f"{path}:make").module())(np.zeros((1, 1, 4, 4), np.float32))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.split() == ["import", "call", "build", "labels", "forward", "forward"]


def test_resolve_knows_the_form(written: Written) -> None:
    path = written("")
    assert resolve(f"{path}:net").missing == ("--input-shape", "--mean", "--std", "--resize", "--labels")
    with pytest.raises(ModelError, match=r"which of its functions gives the network is not said; give net\.py:net"):
        resolve(str(path))


# What is refused before anything runs


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("absent.py:net", "there is no file absent.py"),
        ("absent.py", "there is no file absent.py"),
        ("net.txt:net", "net.txt is no Python file"),
        ("folder/net:make", "folder/net is no Python file"),
        (".py:", "there is no file .py"),
        (":net", "':net' is neither a network nor a function"),
        ("net:", "'net:' is neither a network nor a function"),
        ("a b:net", "'a b:net' is neither a network nor a function"),
        (".networks:net", "'.networks:net' is neither a network nor a function"),
        ("torchvison:resnet18", "there is no module torchvison; did you mean torchvision:…?"),
        ("absent_module:net", "there is no module absent_module; looked for in the current folder and among"),
        ("torch.absent:net", "there is no module torch.absent"),
    ],
)
def test_nothing_is_there(model: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.txt").write_text("")
    assert refusal(model).startswith(said)


@pytest.mark.parametrize("end", ["", ":"])
def test_a_file_alone_is_answered_with_its_functions_and_not_run(written: Written, end: str) -> None:
    path = written("def _private(): ...\nclass Net: ...\nraise SystemExit")
    assert refusal(f"{path}{end}").endswith("; give net.py:net or net.py:Net")
    path.write_text("x = 1")
    assert refusal(f"{path}{end}").endswith("; give net.py:factory; no function is defined there")
    path.write_text("def broken(:")
    assert "no function" in refusal(f"{path}{end}")


@pytest.mark.parametrize("weights", ["random", "imagenet", "", "weights.onnx"])
def test_the_factory_decides_about_weights(written: Written, weights: str) -> None:
    path = written("raise SystemExit")
    assert f"are what the factory gives, not {weights!r}; leave --weights out" in refusal(f"{path}:net", weights)


# What its code does wrong


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("def broken(:", r"cannot be imported: SyntaxError: .*\(.*net\.py:7\)"),
        ("import absent_module", r"cannot be imported: ModuleNotFoundError: .*absent_module.* \(.*net\.py:7\)"),
        ("from torch import absent", r"cannot be imported: ImportError: .*absent.*\(.*net\.py:7\)"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*net\.py:7\)"),
        ("raise SystemExit(3)", r"cannot be imported: SystemExit: 3 \(.*net\.py:7\)"),
        ("raise ValueError('two\\nlines')", r"cannot be imported: ValueError: two lines \("),
        ("raise ValueError", r"cannot be imported: ValueError \("),
        ("import helper", r"cannot be imported: KeyError: 'x' \(.*helper\.py:2\)"),
        ("from .helper import x", r"ImportError: attempted relative .*; a file alone .* give package\.module:factory"),
    ],
)
def test_a_file_that_cannot_be_imported(written: Written, tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "helper.py").write_text("\n{}['x']")
    path = written(lines)
    names = set(sys.modules)
    with pytest.raises(ModelError, match=said):
        source_of(f"{path}:net")
    assert {name for name in set(sys.modules) - names if "factory" in name} == set()
    assert "\n" not in refusal(f"{path}:net")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no GPU')", r"make in .*net\.py failed: RuntimeError: no GPU \(.*net\.py:7\)"),
        ("nn.Conv2d(3, 10, 3, groups=4)", r"make in .*net\.py failed: ValueError: in_channels .*\(.*net\.py:7\)"),
        ("raise SystemExit", r"make in .*net\.py failed: SystemExit \(.*net\.py:7\)"),
        ("return ModelSource(build=lambda: 1 / 0)", r"make in .*net\.py failed: ZeroDivisionError.*net\.py:7\)"),
    ],
)
def test_a_factory_that_raises(written: Written, body: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        source_of(f"{written(f'def make(): {body}')}:make")
    assert caught.value.__cause__ is not None


def test_an_interruption_passes(written: Written) -> None:
    with pytest.raises(KeyboardInterrupt):
        source_of(f"{written('def make(): raise KeyboardInterrupt')}:make")


def test_our_own_errors_pass(written: Written) -> None:
    with pytest.raises(DataError, match=r"^mean has 1 and std 3 values, RGB needs 3 of each$"):
        source_of(f"{written('def make(): return Preprocess(4, None, (0.5,), (0.5,) * 3)')}:make")


@pytest.mark.parametrize(
    ("lines", "name", "said"),
    [
        ("", "nett", "net.py has no nett; did you mean net?"),
        ("", "xyz", "net.py has no xyz; there are net"),
        ("width = 3", "width", "width in .*net.py is a int; name a function"),
        ("model = net()", "model", "model in .*net.py is a network already, expected a function that gives one"),
    ],
)
def test_a_name_that_is_no_factory(written: Written, lines: str, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said.replace("?", r"\?")):
        source_of(f"{written(lines)}:{name}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("None", "gives nothing; let it return the network"),
        ("nn.Linear", "gives the class Linear, not a network; let it return Linear()"),
        ("net().state_dict()", "gives weights without a network (a OrderedDict); let it load them"),
        ("{'epoch': 3, 'model': net().state_dict()}", "gives weights without a network (a dict)"),
        ("{}", "gives a dict, expected an nn.Module or a ModelSource"),
        ("net, None", "gives a tuple, expected an nn.Module"),
        ("ModelSource(build=lambda: None)", "gives nothing"),
        ("ModelSource(build=lambda: nn.Linear)", "gives the class Linear"),
        ("ModelSource(onnx='net.onnx')", "gives the ONNX file net.onnx; name that file as the model"),
        ("ModelSource(build=net())", "the build of make is a network, expected a function; give build=lambda: net"),
        ("ModelSource(build=5)", "the build of make is a int; give build=lambda: net"),
        ("ModelSource(build=net, labels='cat')", "the labels of make are one text, 'cat'"),
        ("ModelSource(build=net, labels=lambda: 'cat')", "the labels of make are one text, 'cat'"),
        ("ModelSource(build=net, labels=lambda: 1 / 0)", "failed: ZeroDivisionError: division by zero"),
        ("ModelSource(build=net, labels=5)", "the labels of make are a int; give a tuple of names"),
        ("ModelSource(build=net, labels=('a', 2, 'c'))", "2 of the labels of make is no text"),
        ("nn.Bilinear(2, 2, 2)", "forward() takes 2 tensors: input1, input2; only networks of one image input are"),
        ("ModelSource(build=net, preprocess=(0.5,), input_shape=(1, 4, 4))", "the preprocess of make is a tuple"),
        ("ModelSource(build=net, input_shape=(4, 4))", "the input shape of make is (4, 4); give (channels,"),
        ("ModelSource(build=net, input_shape=(1, 0, 4))", "the input shape of make is (1, 0, 4)"),
        ("ModelSource(build=net, input_shape=4)", "the input shape of make is 4"),
        (
            "ModelSource(build=net, preprocess=GREY, input_shape=(1, 5, 5))",
            "make says an input shape of (1, 5, 5), and its preprocess gives (1, 4, 4); make them agree",
        ),
        ("nn.LazyLinear(3)", "has no shape yet; run the network once on an example"),
        ("nn.Linear(2, 3, device='meta')", "is on the meta device, without values"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_no_network(written: Written, value: str, said: str) -> None:
    assert said in refusal(f"{written(f'def make(): return {value}')}:make")


@pytest.mark.parametrize(
    ("signature", "options", "said"),
    [
        ("classes, width", {}, "needs arguments: classes, width; give --option classes=VALUE --option width=VALUE"),
        ("classes, *, width", {"classes": 3}, "needs arguments: width; give --option width=VALUE"),
        ("classes, /", {}, "needs the positional argument classes; let it be given by its name"),
        ("classes=3", {"clases": 3}, "takes no option clases; it takes classes"),
        ("", {"classes": 3}, "takes no option classes; it takes none"),
    ],
)
def test_arguments(written: Written, signature: str, options: dict[str, Any], said: str) -> None:
    """None of them is called."""
    assert said in refusal(f"{written(f'def make({signature}): 1 / 0')}:make", **options)


def test_a_builtin_tells_nothing_about_its_arguments() -> None:
    assert "dict in builtins gives a dict, expected" in refusal("builtins:dict", classes=3)


@pytest.mark.parametrize(
    "parameters", ["self, x", "self, *xs", "self, x, mask=None", "self, x=None, **rest", "self, x, /"]
)
def test_one_input_is_enough(parameters: str) -> None:
    check_one_input(module_with(parameters))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [("self, x, y", "2 tensors: x, y"), ("self, x, *, y", "2 tensors: x, y"), ("self", "no image")],
)
def test_other_inputs_are_too_many(parameters: str, said: str) -> None:
    with pytest.raises(ModelError, match=rf"^forward\(\) takes {said}; only networks of one image input are taken$"):
        check_one_input(module_with(parameters))


def module_with(parameters: str) -> nn.Module:
    names: dict[str, Any] = {}
    exec(f"def forward({parameters}): ...", names)
    return type("Net", (nn.Module,), {"forward": names["forward"]})()  # type: ignore[no-any-return]


def test_labels_may_be_alike_or_none_at_all(written: Written) -> None:
    path = written("def make(labels): return ModelSource(build=net, labels=lambda: labels)")
    assert source_of(f"{path}:make", labels=["crane", "crane", "cat"]).class_names() == ("crane", "crane", "cat")
    assert source_of(f"{path}:make", labels=()).class_names() == ()


# Weights of a file


def test_a_file_is_loaded_over_what_the_factory_gives(written: Written, tmp_path: Path) -> None:
    path = written("def make(): return ModelSource(build=net, preprocess=GREY, labels=('a', 'b', 'c'))")
    state = {"1.weight": torch.full((3, 16), 0.5), "1.bias": torch.ones(3)}
    torch.save(state, tmp_path / "own.pth")
    source = source_of(f"{path}:make", str(tmp_path / "own.pth"))
    assert torch.equal(source.module()[1].weight, state["1.weight"])
    assert (source.weights, source.note) == (str(tmp_path / "own.pth"), "")
    assert (source.preprocess, source.labels) == (GREY, ("a", "b", "c"))
    assert source.fingerprint != source_of(f"{path}:make").fingerprint


def test_what_the_file_says_of_itself_goes_first(written: Written, tmp_path: Path) -> None:
    path = written("def make(): return ModelSource(build=net, preprocess=GREY, labels=('a', 'b', 'c'))")
    other = Preprocess((5, 5), None, (0.25,), (0.5,), colour="L")
    metadata = {"preprocess": json.dumps(other.to_json()), "labels": json.dumps(["x", "y", "z"])}
    save_file({"1.weight": torch.ones(3, 16), "1.bias": torch.ones(3)}, tmp_path / "own.safetensors", metadata)
    source = source_of(f"{path}:make", str(tmp_path / "own.safetensors"))
    assert (source.preprocess, source.input_shape, source.labels) == (other, (1, 5, 5), ("x", "y", "z"))


def test_a_file_has_to_fit(written: Written, tmp_path: Path) -> None:
    torch.save({"1.weight": torch.ones(4, 16), "1.bias": torch.ones(4)}, tmp_path / "own.pth")
    said = refusal(f"{written('')}:net", str(tmp_path / "own.pth"))
    assert "own.pth does not fit this network" in said
    assert "there is no weights file" in refusal(f"{written('')}:net", str(tmp_path / "absent.pth"))


def test_every_error_is_ours(written: Written) -> None:
    with pytest.raises(EdgewrightError):
        source_of(f"{written('')}:absent")


def test_own_modules_are_neither_of_libraries_nor_of_this_project() -> None:
    found = own_modules()
    assert {"json", "pytest", "torch.nn", "numpy", "edgewright.export.factories"} & found.keys() == set()
    assert Path(__file__) in found.values()
    assert "pytest" in own_modules("pytest")
