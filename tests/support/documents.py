"""The commands, programs and links of the documents, read out of their Markdown.

A block is fenced or indented by four spaces. It holds commands if it is tagged as a shell's, or untagged with a line
that begins with one of `PROGRAMS`. Whatever a test cannot run carries a mark that says why: an HTML comment on the line
before the block, such as `<!-- slow: trains for hours -->`; Markdown does not show it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Block", "Mark", "anchors", "blocks", "commands", "file_name", "holds_commands", "links", "orphans"]

KINDS = {
    "slow": "takes more than a few seconds",
    "gpu": "needs an NVIDIA GPU",
    "device": "is for another machine, such as a Jetson",
    "install": "downloads, installs or changes what is outside the folder",
    "tested": "another test runs it; the words begin with that file",
    "part": "goes on in a program of the reader's, whose names are not there",
}
"""The marks, and what each says of its block."""

PROGRAMS = frozenset(
    {"edgewright", "make", "python", "python3", "pip", "pytest", "git", "uv", "conda", "docker"}
    | {"sudo", "apt", "scp", "ssh", "rsync", "curl", "wget", "export", "source", "eval", "."}
    | {"nvidia-smi", "nvpmodel", "jetson_clocks", "trtexec", "journalctl", "systemctl"}
)
"""What a line of an untagged block begins with if the block is to be pasted into a shell."""
SHELLS = frozenset({"sh", "bash", "shell", "console"})

MARK = re.compile(r"^<!-- *([a-z]+): *(.*?) *-->$")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)(.*)$")
INDENT = "    "


@dataclass(frozen=True)
class Mark:
    """Why no test runs a block. line: counted from 1."""

    line: int
    kind: str
    why: str


@dataclass(frozen=True)
class Block:
    """line: of its first line of content, counted from 1; language: of the fence, "" if untagged or indented."""

    line: int
    lines: tuple[str, ...]
    language: str = ""
    fenced: bool = False
    mark: Mark | None = None

    @property
    def text(self) -> str:
        """Its content as it would be pasted."""
        return "\n".join(self.lines) + "\n"


def blocks(text: str) -> list[Block]:
    """All blocks of a document, in order."""
    return [item for item in _items(text) if isinstance(item, Block)]


def orphans(text: str) -> list[Mark]:
    """Marks with no commands or program behind them, and such of no known kind or without words."""
    items = _items(text)
    used = {
        item.mark for item in items if isinstance(item, Block) and (holds_commands(item) or item.language == "python")
    }
    return [
        item
        for item in items
        if isinstance(item, Mark) and (item not in used or item.kind not in KINDS or not item.why)
    ]


def holds_commands(block: Block) -> bool:
    """Whether it is to be pasted into a shell."""
    if block.language:
        return block.language in SHELLS
    return any(_program(line) in PROGRAMS for line in block.lines)


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The line and the words of each command; comments are left out, continued lines joined.

    Raises `ValueError` if a quotation does not end.
    """
    pending = ""
    for offset, line in enumerate(block.lines):
        if not pending:
            began = block.line + offset
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(pending.removeprefix("$ "), comments=True)
        pending = ""
        if words:
            yield began, [words[0].removeprefix(".venv/bin/"), *words[1:]]


def file_name(block: Block) -> str | None:
    """The file that a program is to be saved as, where its first line is a comment that names one."""
    match = re.fullmatch(r"# ([\w-]+\.py)", block.lines[0]) if block.lines else None
    return match and match[1]


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every inline link outside of code."""
    code = {block.line + offset for block in blocks(text) for offset in range(len(block.lines))}
    for number, line in enumerate(text.splitlines(), 1):
        if number not in code:
            for match in re.finditer(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`(?!\])", "", line)):
                yield number, match[1]


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to the headings: lower case, hyphens for spaces, no punctuation."""
    code = {block.line + offset for block in blocks(text) for offset in range(len(block.lines))}
    found: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if number in code or not (match := re.match(r"#{1,6} +(.*?) *$", line)):
            continue
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).lower()).replace(" ", "-")
        again = 0
        while (name := f"{slug}-{again}" if again else slug) in found:
            again += 1
        found.add(name)
    return found


def _program(line: str) -> str:
    words = line.removeprefix("$ ").split(maxsplit=1)
    return words[0].removeprefix(".venv/bin/") if words and not line.startswith(" ") else ""


def _items(text: str) -> list[Block | Mark]:
    """Blocks and marks in their order; a mark belongs to the block that begins on one of the next two lines."""
    lines = text.splitlines()
    items: list[Block | Mark] = []
    mark: Mark | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        if found := MARK.match(line):
            mark = Mark(number + 1, found[1], found[2])
            items.append(mark)
            number += 1
        elif fence := FENCE.match(line):
            end = _end_of_fence(lines, number + 1, fence[1])
            words = fence[2].split()
            items.append(Block(number + 2, tuple(lines[number + 1 : end]), (*words, "")[0], True, mark))
            number, mark = end + 1, None
        elif line.startswith(INDENT) and line.strip() and _may_begin(lines, number):
            end = _end_of_indented(lines, number)
            content = tuple(content.removeprefix(INDENT) for content in lines[number:end])
            items.append(Block(number + 1, content, mark=mark))
            number, mark = end, None
        else:
            mark = mark if not line.strip() else None
            number += 1
    return items


def _may_begin(lines: list[str], number: int) -> bool:
    """An indented block does not interrupt a paragraph."""
    before = lines[number - 1].strip() if number else ""
    return not before or MARK.match(before) is not None


def _end_of_fence(lines: list[str], start: int, fence: str) -> int:
    closing = re.compile(rf"^ {{0,3}}{fence[0]}{{{len(fence)},}} *$")
    return next((number for number in range(start, len(lines)) if closing.match(lines[number])), len(lines))


def _end_of_indented(lines: list[str], start: int) -> int:
    """Blank lines belong to the block if it goes on behind them."""
    end = start
    for number in range(start, len(lines)):
        if lines[number].startswith(INDENT) and lines[number].strip():
            end = number + 1
        elif lines[number].strip():
            break
    return end
