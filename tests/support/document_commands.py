"""What is wrong with the commands of a document, without running them, and running those that a test can run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from documents import KINDS, Block, blocks, commands, holds_commands, orphans
from edgewright.cli import cli
from edgewright.cli_help import commands_of
from edgewright.export.models import MODELS

__all__ = ["ROOT", "faults", "make_targets", "runnable", "usage_fault"]

ROOT = Path(__file__).parents[2]
COMMANDS = dict(commands_of(cli))
QUICK = frozenset({"lenet", "lenet_bn"})
"""Networks of the registry that a test may take through the stages."""
MAKE_COMMANDS = {"engine": "engine", "bundle": "pack", "train": "train"}
"""Targets that pass MODEL and ARGS on, and the command that gets them."""
REDIRECTIONS = (">", ">>", "|", "&&")


def faults(document: str, text: str) -> Iterator[str]:
    """One sentence for each command that cannot be right, is neither run nor marked, and for each mark of nothing."""
    for block in blocks(text):
        if holds_commands(block):
            yield from (f"{document}:{line}: {fault}" for line, fault in _faults_of(block))
    for mark in orphans(text):
        yield (
            f"{document}:{mark.line}: <!-- {mark.kind}: {mark.why} --> marks nothing; a mark is one of "
            f"{', '.join(KINDS)} with a reason, and stands before a block of commands or Python"
        )
    for block in blocks(text):
        if block.mark and block.mark.kind == "tested" and not (ROOT / block.mark.why.split()[0].strip(",:;")).is_file():
            yield f"{document}:{block.mark.line}: there is no {block.mark.why.split()[0]}"


def _faults_of(block: Block) -> Iterator[tuple[int, str]]:
    try:
        found = list(commands(block))
    except ValueError as error:
        yield block.line, f"no shell reads this ({error})"
        return
    for line, words in found:
        if fault := usage_fault(words):
            yield line, f"`{shlex.join(words)}`: {fault}"
    unrun = next(((line, words, why) for line, words in found if (why := _why_not(words))), None)
    if unrun and block.mark is None:
        line, words, why = unrun
        yield line, f"no test runs `{shlex.join(words)}`: {why}. {_remedy(block)}"


def _remedy(block: Block) -> str:
    place = block.line - bool(block.fenced)
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    return f"Change it, or put <!-- KIND: why --> on a line of its own before line {place}, with KIND one of: {kinds}"


def usage_fault(words: Sequence[str]) -> str:
    """Why `edgewright` or `make` would not take these words; "" if they do, or if it is another program."""
    if words[0] == "edgewright":
        return _cli_fault(_plain(words)[1:])
    if words[0] == "make":
        return _make_fault(_plain(words)[1:])
    return ""


def _cli_fault(arguments: Sequence[str]) -> str:
    if not arguments or arguments[0].startswith("-"):
        return _parsed(cli, "edgewright", arguments)
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in COMMANDS:
            return _parsed(COMMANDS[name], name, arguments[count:])
    return f"there is no command {arguments[0]!r}"


def _parsed(command: click.Command, name: str, arguments: Sequence[str]) -> str:
    try:
        command.make_context(name, list(arguments), resilient_parsing=bool({"--help", "--version"} & {*arguments}))
    except click.UsageError as error:
        return error.format_message()
    return ""


def _make_fault(arguments: Sequence[str]) -> str:
    variables = dict(word.split("=", 1) for word in arguments if "=" in word)
    targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
    unknown = [target for target in targets if target not in make_targets()]
    if unknown:
        return f"the Makefile has no target {unknown[0]}"
    for target in targets:
        if target in MAKE_COMMANDS:
            given = [variables.get("MODEL", "MODEL"), *shlex.split(variables.get("ARGS", ""))]
            return _cli_fault([MAKE_COMMANDS[target], *given])
    return ""


def make_targets() -> dict[str, str]:
    """Those that a person asks for (.PHONY), with the words that `make help` has for them."""
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert declared is not None
    words = dict(re.findall(r"^([a-z-]+):.*?## *(.*)$", text, re.MULTILINE))
    return {target: words.get(target, "") for target in declared[1].split()}


def runnable(words: Sequence[str]) -> bool:
    """Whether the test can run these words, in this process."""
    return not _why_not(words)


def _why_not(words: Sequence[str]) -> str:
    if not (words[0] == "edgewright" or (words[0] in ("python", "python3") and words[1:2] and len(words) == 2)):
        return f"it knows edgewright and python FILE.py, not {words[0]}"
    if any(word in words for word in (">>", "|", "&&", "<")) or (">" in words and words.index(">") != len(words) - 2):
        return "it is no shell"
    named = {part for word in words for part in re.split(r"[/.:]", word)} & (MODELS.keys() - QUICK)
    return f"{min(named)} is too slow; {' or '.join(sorted(QUICK))} is not" if named else ""


def _plain(words: Sequence[str]) -> list[str]:
    """Without what follows a redirection."""
    end = next((index for index, word in enumerate(words) if word in REDIRECTIONS), len(words))
    return list(words[:end])
