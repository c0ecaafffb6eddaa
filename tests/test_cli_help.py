"""The help at the prompt: every command has an example that its own options take, and the shells are told all."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from edgewright.cli import cli
from edgewright.cli_help import EXAMPLES, SHORT, commands_of

COMMANDS = dict(commands_of(cli))
WIDTH = 80


def test_every_command_has_an_example_and_every_example_a_command() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("words", sorted(set(COMMANDS) - {"completion"}))
def test_the_command_takes_its_example(words: str) -> None:
    program, *arguments = shlex.split(EXAMPLES[words])
    count = len(words.split())
    assert (program, " ".join(arguments[:count])) == ("edgewright", words)
    command = COMMANDS[words]
    with command.make_context(words, arguments[count:]) as context:  # raises for an unknown option or value
        assert context.args == []


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_the_help_ends_with_the_example_and_fits(words: str) -> None:
    result = CliRunner().invoke(cli, [*words.split(), "--help"], terminal_width=WIDTH)
    assert result.exit_code == 0
    lines = result.output.rstrip().splitlines()
    assert (lines[-2].strip(), lines[-1].strip()) == ("Example:", EXAMPLES[words])
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("group", ["", "calibration"])
def test_the_list_of_commands_cuts_no_sentence_off(group: str) -> None:
    result = CliRunner().invoke(cli, [*group.split(), "--help"], terminal_width=WIDTH)
    assert result.exit_code == 0
    assert "..." not in result.output.replace("[ARGS]...", "")
    assert max(map(len, result.output.splitlines())) <= WIDTH


def test_short_sentences_are_of_commands_that_need_them() -> None:
    assert SHORT.keys() <= COMMANDS.keys()


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(click.NoSuchOption):
        COMMANDS["engine"].make_context("engine", ["--no-such-option"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_asks_this_program(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_EDGEWRIGHT_COMPLETE={shell}_complete" in result.output


@pytest.mark.parametrize(
    ("words", "incomplete", "found"),
    [
        (["engine"], "lenet", {"lenet", "lenet_bn", "lenet_bn_scratch"}),
        (["calibration", "check", "--model"], "resnet1", {"resnet18", "resnet101", "resnet152"}),
        (["engine"], "net.p", {"net.p"}),  # left to the shell, as a file
    ],
)
def test_networks_are_completed(words: list[str], incomplete: str, found: set[str]) -> None:
    items = ShellComplete(cli, {}, "edgewright", "_EDGEWRIGHT_COMPLETE").get_completions(words, incomplete)
    assert {item.value for item in items} == found
    assert {item.type for item in items} == ({"file"} if incomplete == "net.p" else {"plain"})


def test_completion_is_for_shells() -> None:
    result = CliRunner().invoke(cli, ["completion", "csh"])
    assert (result.exit_code, "csh" in result.output) == (2, True)


def test_bash_reads_the_completion(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(CliRunner().invoke(cli, ["completion", "bash"]).output)
    result = subprocess.run(
        ["bash", "-c", f"source {script}; complete -p edgewright"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, "_edgewright_completion edgewright" in result.stdout) == (0, True)


def test_what_completes_a_command() -> None:
    found = CliRunner().invoke(
        cli,
        [],
        prog_name="edgewright",
        env={"_EDGEWRIGHT_COMPLETE": "bash_complete", "COMP_WORDS": "edgewright expl", "COMP_CWORD": "1"},
    )
    assert found.output.splitlines() == ["plain,explain"]


def test_verbose_and_quiet_contradict() -> None:
    result = CliRunner().invoke(cli, ["export", "lenet", "-v", "-q"])
    assert (result.exit_code, "contradict" in result.output) == (2, True)
