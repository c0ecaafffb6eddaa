"""Files that lie about where their values stand, that are none, or only half of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgewright.export.onnx_files import load_onnx, read_onnx, self_contained
from edgewright.runtime.errors import ModelError

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
Carrier = Callable[[TensorProto], onnx.ModelProto]


def external(location: str, *, offset: str = "", length: str = "", name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=WEIGHT.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(nodes: list[onnx.NodeProto], *initializers: TensorProto) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", side]) for name, side in (("x", 4), ("y", 3)))
    graph = helper.make_graph(nodes, "main", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def product() -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], ["y"])


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return model_of([product()], tensor)


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    return model_of([helper.make_node("Constant", [], ["w"], value=tensor), product()])


def in_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    output = [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [4, 3])]
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["branch"])], "branch", [], output, [tensor])
    condition = numpy_helper.from_array(np.array(True), "condition")
    chosen = helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)
    return model_of([chosen, helper.make_node("MatMul", ["x", "chosen"], ["y"])], condition)


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=tensor), product()]
    opsets = [helper.make_opsetid("", 19)]
    model = model_of([helper.make_node("Dense", ["x"], ["y"], domain="own")])
    model.functions.append(helper.make_function("own", "Dense", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


CARRIERS = pytest.mark.parametrize("carrier", [in_initializer, in_attribute, in_subgraph, in_function])


def written(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def secret(folder: Path) -> Path:
    path = folder / "secret.bin"
    path.write_bytes(WEIGHT.tobytes())
    return path


@CARRIERS
def test_external_data_is_read_wherever_a_tensor_stands(carrier: Carrier, tmp_path: Path) -> None:
    path = written(tmp_path, carrier(external("data/w.bin", offset="8", length="48")))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"12345678" + WEIGHT.tobytes() + b"more")
    content = load_onnx(path).SerializeToString()
    assert WEIGHT.tobytes() in content
    assert b"w.bin" not in content


@CARRIERS
@pytest.mark.parametrize(
    "location", ["../secret.bin", "inner/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", ""]
)
def test_a_place_outside_the_folder_is_refused(carrier: Carrier, location: str, tmp_path: Path) -> None:
    secret(tmp_path)
    (tmp_path / "home" / "inner").mkdir(parents=True)
    with pytest.raises(ModelError, match="expected a path inside the model's folder"):
        load_onnx(written(tmp_path / "home", carrier(external(location))))


@CARRIERS
def test_an_absolute_place_is_refused_even_inside_the_folder(carrier: Carrier, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a path inside the model's folder"):
        load_onnx(written(tmp_path, carrier(external(str(secret(tmp_path))))))


@CARRIERS
def test_a_symbolic_link_that_leads_out_is_refused(carrier: Carrier, tmp_path: Path) -> None:
    path = written(tmp_path / "home", carrier(external("w.bin")))
    (path.parent / "w.bin").symlink_to(secret(tmp_path))
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_onnx(path)


def test_a_linked_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "home", in_initializer(external("data/secret.bin")))
    (tmp_path / "other").mkdir()
    secret(tmp_path / "other")
    (path.parent / "data").symlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_onnx(path)


def test_a_sibling_whose_name_begins_like_the_folder_is_outside(tmp_path: Path) -> None:
    path = written(tmp_path / "home", in_initializer(external("data/secret.bin")))
    (tmp_path / "home2").mkdir()
    secret(tmp_path / "home2")
    (path.parent / "data").symlink_to(tmp_path / "home2")
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_onnx(path)


def test_links_inside_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    path = written(tmp_path / "home", in_initializer(external("w.bin")))
    (path.parent / "w.bin").symlink_to(secret(path.parent))
    (tmp_path / "link").symlink_to(path.parent)
    (values,) = load_onnx(tmp_path / "link" / "net.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(values), WEIGHT)


def test_a_link_that_is_put_in_place_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "home", in_initializer(external("w.bin")))
    data = path.parent / "w.bin"
    data.write_bytes(WEIGHT.tobytes())
    real_path = os.path.realpath

    def swapped(place: Path, *, strict: bool = False) -> str:
        real = real_path(place, strict=strict)
        if Path(place).name == data.name:
            data.unlink()
            data.symlink_to(secret(tmp_path))
        return real

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(ModelError, match=r"the external data of 'w' .* cannot be opened"):
        load_onnx(path)


def test_a_hard_link_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "home", in_initializer(external("w.bin")))
    os.link(secret(tmp_path), path.parent / "w.bin")
    with pytest.raises(ModelError, match=r"hard link: the same file has 2 names.*copy the file"):
        load_onnx(path)
    (tmp_path / "secret.bin").unlink()
    load_onnx(path)


@pytest.mark.parametrize("linked", ["net.onnx", "symbolic", "hard"])
def test_the_model_is_not_its_own_external_data(linked: str, tmp_path: Path) -> None:
    path = written(tmp_path, in_initializer(external(linked, length="48")))
    if linked == "symbolic":
        (tmp_path / linked).symlink_to(path)
    elif linked == "hard":
        os.link(path, tmp_path / linked)
    with pytest.raises(ModelError, match="stands in that file itself"):
        load_onnx(path)


@pytest.mark.parametrize(
    ("sides", "fits"),
    [
        (["n", 3, 8192, 8192], True),
        ([31, 1, 8192, 8192], True),
        ([1, 1, 1 << 40, 1 << 40], False),
        ([1, 1, 8192, 8193], False),
        ([32, 1, 8192, 8192], False),
        ([-1, 3, -1, 8192], True),
        (["n", 1 << 32], False),
    ],
)
def test_an_input_that_no_image_fills_is_refused(sides: list[int | str], fits: bool, tmp_path: Path) -> None:
    image, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "main", [image], [output])
    path = written(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))
    if fits:
        load_onnx(path)
        return
    with pytest.raises(ModelError, match="expected at most 67108864 pixels in an image and 2147483647 numbers"):
        load_onnx(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, in_initializer(external("w.bin")))
    os.mkfifo(tmp_path / "w.bin")  # reading it would wait for ever
    with pytest.raises(ModelError, match="not a regular file"):
        load_onnx(path)
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_onnx(path)
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        load_onnx(path)


@pytest.mark.parametrize("location", ["absent.bin", "loop", "a\0b", "x" * 5000, "*/_ORT_MEM_ADDR_/*"])
def test_a_place_with_nothing_there_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError, match="cannot be found"):
        load_onnx(written(tmp_path, in_initializer(external(location))))


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        ("4", "48", "ends at byte 52"),
        ("99999999999999999999", "48", "ends at byte"),
        ("", "", "ends at byte 48"),
        ("-4", "48", "expected 48 for its shape"),
        ("0", "4", "expected 48 for its shape"),
        ("0", "99999999999", "expected 48 for its shape"),
        ("one", "48", "no valid extent"),
    ],
)
def test_an_extent_that_does_not_fit_is_refused(offset: str, length: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, in_initializer(external("w.bin", offset=offset, length=length)))
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[: 48 if length else 47])
    with pytest.raises(ModelError, match=reason):
        load_onnx(path)


def test_a_shape_that_needs_more_than_can_be_written_is_refused_unread(tmp_path: Path) -> None:
    tensor = external("w.bin")
    tensor.dims[:] = [1 << 20, 1 << 10]
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(1 << 32)  # a sparse file: 4 GiB of which nothing is stored
    with pytest.raises(ModelError, match=r"holds 4\.0 GiB with its external data"):
        load_onnx(written(tmp_path, in_initializer(tensor)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no graph"),
        (b"<!DOCTYPE html><html></html>", "download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04rest", "zip archive"),
        (np.random.default_rng(0).bytes(4096), "not an ONNX file"),
        (in_initializer(numpy_helper.from_array(WEIGHT, "w")).SerializeToString()[:-20], "ONNX"),
    ],
)
def test_what_is_not_onnx_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        load_onnx(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_onnx(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        load_onnx(tmp_path)


def test_what_the_checker_refuses_is_refused(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Convolution", ["x"], ["y"])])
    with pytest.raises(ModelError, match="not valid ONNX"):
        load_onnx(written(tmp_path, model))


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    inside = written(tmp_path / "a", in_initializer(numpy_helper.from_array(WEIGHT, "w")))
    assert read_onnx(inside).fingerprint == "sha256:" + hashlib.sha256(inside.read_bytes()).hexdigest()
    outside = written(tmp_path / "b", in_initializer(external("secret.bin")))
    data = secret(outside.parent)
    first = read_onnx(outside)
    data.write_bytes((WEIGHT + 1).tobytes())
    second = read_onnx(outside)
    assert first.fingerprint != second.fingerprint
    assert load_onnx(outside, fingerprint=second.fingerprint) == second.proto
    with pytest.raises(ModelError, match=r"net\.onnx changed during the run; run again"):
        load_onnx(outside, fingerprint=first.fingerprint)


def test_the_fingerprint_is_that_of_what_was_read(tmp_path: Path) -> None:
    path = written(tmp_path, in_initializer(numpy_helper.from_array(WEIGHT, "w")))
    file = read_onnx(path)
    path.write_bytes(b"something else by now")
    assert file.fingerprint == "sha256:" + hashlib.sha256(file.proto.SerializeToString()).hexdigest()


@CARRIERS
def test_weights_from_beside_the_file_are_put_inside(carrier: Carrier, tmp_path: Path) -> None:
    path = written(tmp_path, carrier(external("w.bin")))
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    whole = self_contained(path)
    (tmp_path / "w.bin").unlink()
    (y,) = ReferenceEvaluator(whole).run(None, {"x": np.eye(4, dtype=np.float32)})
    np.testing.assert_array_equal(y, WEIGHT)


def test_a_file_with_its_weights_inside_stays_as_it_is(tmp_path: Path) -> None:
    model = in_initializer(numpy_helper.from_array(WEIGHT, "w"))
    model.graph.node[0].op_type = "NotOfOnnx"  # that is for whoever runs it to say
    path = written(tmp_path, model)
    assert self_contained(path) == path.read_bytes()


@pytest.mark.parametrize("location", ["../w.bin", "/w.bin", "none.bin"])
def test_weights_from_elsewhere_are_not_put_inside(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    with pytest.raises(ModelError, match=r"the external data of 'w'"):
        self_contained(written(tmp_path / "home", in_initializer(external(location))))
