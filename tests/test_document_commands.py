"""Reading the documents' Markdown, and that what is wrong in one would be noticed."""

from __future__ import annotations

import pytest

from document_commands import faults, usage_fault
from documents import Block, Mark, anchors, blocks, commands, file_name, holds_commands, links, orphans

PAGE = """# A page

Words, with `edgewright code` in them.

    edgewright models              # indented

<!-- slow: takes an hour -->
```
edgewright engine lenet \\
    --threads 1
```

- a list
    that goes on

```python
# net.py
print("edgewright models")
```

```text
edgewright: not a command
```

    === output ===
"""


def words_of(text: str) -> list[list[str]]:
    return [words for block in blocks(text) if holds_commands(block) for _, words in commands(block)]


def test_blocks() -> None:
    mark = Mark(7, "slow", "takes an hour")
    assert blocks(PAGE) == [
        Block(5, ("edgewright models              # indented",)),
        Block(9, ("edgewright engine lenet \\", "    --threads 1"), fenced=True, mark=mark),
        Block(17, ("# net.py", 'print("edgewright models")'), "python", fenced=True),
        Block(22, ("edgewright: not a command",), "text", fenced=True),
        Block(25, ("=== output ===",)),
    ]
    assert [file_name(block) for block in blocks(PAGE)] == [None, None, "net.py", None, None]
    assert words_of(PAGE) == [["edgewright", "models"], ["edgewright", "engine", "lenet", "--threads", "1"]]


def test_blank_lines_within_an_indented_block() -> None:
    (block,) = blocks("Text\n\n    make test\n\n    make lint\n\nText")
    assert (block.line, block.lines) == (3, ("make test", "", "make lint"))


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("<!-- slow: why -->\n    make test", True),
        ("<!-- slow: why -->\n\n    make test", True),
        ("<!-- slow: why -->\nWords.\n\n    make test", False),
        ("<!-- slow: why -->\n    make test\n\nWords.\n\n    make lint", True),
    ],
)
def test_a_mark_stands_before_its_block(text: str, marked: bool) -> None:
    assert (blocks(text)[0].mark is not None) == marked
    assert (orphans(text) == []) == marked
    assert all(block.mark is None for block in blocks(text)[1:])


@pytest.mark.parametrize(
    "text",
    [
        "<!-- slow: why -->\n\nNo block.",
        "<!-- slow: why -->\n    onnxruntime  fp32  16.1  94.32",
        "<!-- slow: why -->\n```json\n{}\n```",
        "<!-- slow: why -->",
        "<!-- slow: one -->\n<!-- slow: two -->\n    make test",
        "<!-- lazy: no such kind -->\n    make test",
        "<!-- slow: -->\n    make test",
        "<!-- tested: tests/test_nothing.py -->\n    make test",
    ],
)
def test_a_stale_mark_is_noticed(text: str) -> None:
    assert [fault for fault in faults("page.md", text) if "marks nothing" in fault or "there is no" in fault]


@pytest.mark.parametrize(
    "line",
    [
        "edgewright engine lenet",
        "edgewright bench build/lenet --json > before.json",
        ".venv/bin/edgewright run shoe.png --model lenet",
        "edgewright engine net.py:build --calibration photos",
        "python train.py",
        "$ edgewright doctor",
    ],
)
def test_what_is_run_needs_no_mark(line: str) -> None:
    assert list(faults("page.md", f"    {line}")) == []


@pytest.mark.parametrize(
    "line",
    [
        "make test",
        "pip install edgewright",
        "sudo apt update",
        "python -m http.server",
        "edgewright engine resnet50 --calibration a --evaluation b",
        "edgewright bench build/mobilenet_effnet_b0",
        "edgewright models | less",
        "edgewright models > a.txt --json",
    ],
)
@pytest.mark.parametrize(
    "form", ["    {}\n", "```\n{}\n```\n", "```sh\n{}\n```\n"], ids=["indented", "fenced", "tagged"]
)
def test_what_is_not_run_needs_a_mark(line: str, form: str) -> None:
    text = form.format(line)
    (fault,) = faults("page.md", text)
    assert fault.startswith("page.md:")
    assert "before line 1," in fault
    assert list(faults("page.md", f"<!-- slow: why -->\n{text}")) == []


def test_a_tagged_block_is_all_commands() -> None:
    """Also of programs that nobody has heard of."""
    (fault,) = faults("page.md", "```sh\nunheard-of --option\n```")
    assert "unheard-of" in fault


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("edgewright engine lenet --no-such-option", "--no-such-option"),
        ("edgewright engine lenet --max-drop much", "--max-drop"),
        ("edgewright no-such-command lenet", "no-such-command"),
        ("edgewright --no-such-option", "--no-such-option"),
        ("edgewright run", "IMAGES"),
        ("make no-such-target", "no-such-target"),
        ("make engine ARGS='--no-such-option 1'", "--no-such-option"),
        ("make bundle MODEL=lenet ARGS='--archive --no-such-option'", "--no-such-option"),
        ("edgewright engine 'lenet", "no shell reads this"),
    ],
)
def test_no_mark_excuses_what_cannot_be_right(line: str, words: str) -> None:
    (fault,) = faults("page.md", f"<!-- slow: why -->\n    {line}")
    assert words in fault


@pytest.mark.parametrize(
    "words",
    [
        ["edgewright", "--version"],
        ["edgewright", "engine", "--help"],
        ["edgewright", "run", "a.png", "--top", "3", ">", "out.txt"],
        ["make"],
        ["make", "engine", "MODEL=lenet", "ARGS=--method entropy --threads 1"],
        ["make", "test", "ARGS=tests/optimize -k fold"],
        ["scp", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_what_can_be_right(words: list[str]) -> None:
    assert usage_fault(words) == ""


def test_anchors_are_those_of_github() -> None:
    text = "# What it *prints*\n\n## `pack`, and [more](a.md)\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n"
    assert anchors(text) == {"what-it-prints", "pack-and-more", "same", "same-1"}


def test_links() -> None:
    text = "[a](a.md) and `[no](code.md)`, [`b`](b.md#c)\n\n    [no](block.md)\n"
    assert list(links(text)) == [(1, "a.md"), (1, "b.md#c")]
