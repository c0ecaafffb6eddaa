"""The manifest: what is read back, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgewright.runtime.bundle.manifest import FileEntry, Manifest
from edgewright.runtime.bundle.strict_json import parsed, spelled
from edgewright.runtime.errors import BundleError
from edgewright.runtime.files import sha256_of

DIGEST = "ab" * 32
MANIFEST = Manifest(
    "toy", 3, {"onnx": "1.18", "torch": "2.6"}, (FileEntry("a/b.onnx", 5, DIGEST), FileEntry("c", 0, DIGEST))
)


def with_files(*paths: str, size: int = 1) -> bytes:
    return replace(MANIFEST, files=tuple(FileEntry(path, size, DIGEST) for path in paths)).serialized()


def changed(**fields: Any) -> bytes:
    """The manifest with other fields, and a hash of itself that fits."""
    content = {**json.loads(MANIFEST.serialized()), **fields}
    del content["sha256"]
    return spelled({**content, "sha256": sha256_of(spelled(content))})


def test_what_is_written_is_read_back() -> None:
    assert Manifest.parse(MANIFEST.serialized()) == MANIFEST
    assert Manifest.parse(changed(added_later=[1, {"x": None}])) == MANIFEST


def test_the_fields_are_those_of_the_document() -> None:
    content = json.loads(MANIFEST.serialized())
    assert content["schema"] == "edgewright.bundle/1"
    assert content["files"][0] == {"path": "a/b.onnx", "bytes": 5, "sha256": DIGEST}
    assert {"model": "toy", "version": 3, "tools": {"onnx": "1.18", "torch": "2.6"}}.items() <= content.items()


def test_the_order_of_the_tools_changes_nothing() -> None:
    assert replace(MANIFEST, tools={"torch": "2.6", "onnx": "1.18"}).serialized() == MANIFEST.serialized()


@pytest.mark.parametrize(
    "path",
    ["spec.json", "graphs/int8.onnx", "engines/onnxruntime-int8.onnx", "golden/pixels.u8", "a/b/c/d", "A-b_c.1.2", "0"],
)
def test_an_ordinary_path_is_taken(path: str) -> None:
    assert Manifest.parse(with_files(path)).files[0].path == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "is absolute"),
        ("../up", "leaves its folder"),
        ("a/../b", "leaves its folder"),
        ("a/..", "leaves its folder"),
        ("./a", "leaves its folder"),
        ("a\\b", "has a backslash"),
        ("..\\b", "has a backslash"),
        ("C:/windows", "has a drive letter"),
        ("c:file", "has a drive letter"),
        ("", "has an empty part"),
        ("a//b", "has an empty part"),
        ("a/", "has an empty part"),
        ("a\nb", "has control characters"),
        ("a\x00b", "has control characters"),
        ("a\x7f", "has control characters"),
        ("ä.onnx", "has letters beyond ASCII"),
        ("e\u0301", "has letters beyond ASCII"),
        ("a b", "has other characters"),
        ("ab:c", "has other characters"),
        (".hidden", "has other characters"),
        ("a.", "has other characters"),
        ("a..b", "has other characters"),
        ("~/a", "has other characters"),
        ("x" * 201, "more than 200 letters"),
        ("a/b/c/d/e", "more than 4 parts"),
    ],
)
def test_a_path_that_could_mean_another_place_is_refused(path: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        Manifest.parse(with_files(path))


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("a", "a"), "lists a twice"),
        (("A", "a"), "lists a beside A"),
        (("G/x", "g/y"), "lists g/y beside G/"),
        (("a", "a/b"), "lists a/b beside a"),
        (("A", "a/b"), "lists a/b beside A"),
        (("a/b", "a"), "lists a beside a/"),
        (("b", "a"), "not sorted"),
        (("manifest.json",), "lists manifest.json twice"),
        (("Manifest.json",), "beside manifest.json"),
        (("manifest.dsse.json",), "lists manifest.dsse.json twice"),
        (("manifest.json/x",), "beside manifest.json"),
    ],
)
def test_names_that_meet_are_refused(paths: tuple[str, ...], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        Manifest.parse(with_files(*paths))


FILE = {"path": "a", "bytes": 1, "sha256": DIGEST}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": "edgewright.bundle/2"}, "schema is 'edgewright.bundle/2'"),
        ({"schema": None}, "schema is None"),
        ({"model": ""}, "model is ''"),
        ({"model": 7}, "model is 7"),
        ({"model": "x" * 201}, "expected a name"),
        ({"model": "a\u202eb"}, "expected a name"),
        ({"version": 0}, "version is 0"),
        ({"version": -1}, "version is -1"),
        ({"version": 2**31}, "version is 2147483648"),
        ({"version": True}, "version is True"),
        ({"version": 1.0}, "version is 1.0"),
        ({"version": "1"}, "version is '1'"),
        ({"tools": ["x"]}, "tools are"),
        ({"tools": {"x": 1}}, "tools are"),
        ({"tools": {"pillow": "12; rm -r"}}, "tools are"),
        ({"tools": {"pillow": "\x1b[2J"}}, "tools are"),
        ({"tools": {"x y": "1"}}, "tools are"),
        ({"tools": {"x": "1" * 101}}, "tools are"),
        ({"files": {}}, "files are"),
        ({"files": []}, "lists 0 files"),
        ({"files": [FILE] * 65}, "lists 65 files"),
        ({"files": ["a"]}, "expected a file"),
        ({"files": [{**FILE, "path": 1}]}, "path 1"),
        ({"files": [{**FILE, "bytes": -1}]}, "size of a is -1"),
        ({"files": [{**FILE, "bytes": True}]}, "size of a is True"),
        ({"files": [{**FILE, "bytes": 1.0}]}, "size of a is 1.0"),
        ({"files": [{**FILE, "bytes": (2 << 30) + 1}]}, "size of a is 2147483649"),
        ({"files": [{**FILE, "sha256": "AB" * 32}]}, "SHA-256 of a"),
        ({"files": [{**FILE, "sha256": DIGEST[:-1]}]}, "SHA-256 of a"),
        ({"files": [{**FILE, "sha256": None}]}, "SHA-256 of a"),
        ({"files": [{"path": "a"}]}, "size of a is None"),
    ],
)
def test_a_field_of_another_kind_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        Manifest.parse(changed(**fields))


@pytest.mark.parametrize("opened", ["[", '{"a":'])
@pytest.mark.parametrize(("levels", "refused"), [(31, False), (32, True), (500, True), (100_000, True)])
def test_nesting_ends_before_any_python_does(opened: str, levels: int, refused: bool) -> None:
    content = '{"x":' + opened * levels + "0" + ("]" if opened == "[" else "}") * levels + "}"
    if refused:
        with pytest.raises(BundleError, match="it is nested too deeply"):
            parsed(content.encode(), "it")
    else:
        assert parsed(content.encode(), "it").keys() == {"x"}


def test_a_document_is_no_larger_than_can_be_parsed() -> None:
    assert Manifest.parse(with_files("spec.json", size=8 << 20)).files[0].bytes == 8 << 20
    with pytest.raises(BundleError, match=r"size of a/b\.json is 8388609, expected 0 to 8388608 bytes"):
        Manifest.parse(with_files("a/b.json", size=(8 << 20) + 1))


def test_versions_of_tools_are_as_pip_writes_them() -> None:
    tools = {"python": "3.13.0rc1", "torch": "2.14.0+cu130", "onnx": "1!1.23.post1", "onnx-ir": "0.1.0.dev3"}
    assert replace(MANIFEST, tools=tools) == Manifest.parse(replace(MANIFEST, tools=tools).serialized())


def test_sizes_add_up_to_a_limit() -> None:
    assert Manifest.parse(with_files("a", "b", size=2 << 30)).files[1].bytes == 2 << 30
    with pytest.raises(BundleError, match="more than 4294967296"):
        Manifest.parse(with_files("a", "b", "c", size=2 << 30))


@pytest.mark.parametrize("field", ["schema", "model", "version", "tools", "files", "sha256"])
def test_no_field_may_miss(field: str) -> None:
    content = json.loads(MANIFEST.serialized())
    del content[field]
    with pytest.raises(BundleError):
        Manifest.parse(spelled(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace(b'"toy"', b'"boy"'), "hash of itself differs"),
        (lambda text: text.replace(b": 3", b": 4"), "hash of itself differs"),
        (lambda text: text + b" ", "not spelled"),
        (lambda text: text.replace(b"\n", b"\r\n"), "not spelled"),
        (lambda text: text.replace(b'"toy"', b'"\\u0074oy"'), "not spelled"),
        (lambda text: text.replace(b'"toy"', b'"\\ud800"'), "not valid text"),
        (lambda text: text.replace(b'"model"', b'"version": 2, "model"'), "stands there twice"),
        (lambda text: b"\xef\xbb\xbf" + text, "not valid JSON"),
        (lambda text: text.decode().encode("utf-16"), "not valid JSON"),
        (lambda text: text[:-9], "not valid JSON"),
        (lambda text: b"", "not valid JSON"),
        (lambda text: text + text, "not valid JSON"),
    ],
)
def test_a_manifest_has_one_spelling(change: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        Manifest.parse(change(MANIFEST.serialized()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 500_000 + b"}", "500000 digits"),
        (b'{"a": 1, "a": 1}', "stands there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "stands there twice"),
        (b"[]", "is a list"),
        (b"null", "is a NoneType"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
)
def test_json_that_could_mean_two_things_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        parsed(text, "it")


def test_ordinary_json_is_read_as_python_reads_it() -> None:
    text = '{"a": [1, -2.5, 1e3, true, null, "ä\\n"], "b": {"c": 9223372036854775807}}'
    assert parsed(text.encode(), "it") == json.loads(text)
