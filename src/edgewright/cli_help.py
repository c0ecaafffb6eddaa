"""What helps at the prompt: an example below every command's options, and completion for the shells."""

from __future__ import annotations

from collections.abc import Iterator

import click

__all__ = ["EXAMPLES", "SHORT", "add_help", "commands_of", "completion"]

COMPLETE_VARIABLE = "_EDGEWRIGHT_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

EXAMPLES: dict[str, str] = {
    "audit": "edgewright audit build/mobilenet_effnet_b0/engines/onnxruntime-int8.onnx",
    "bench": "edgewright bench build/lenet_bn --backend onnxruntime --backend openvino",
    "blame": "edgewright blame mobilenet_effnet_b0 --dialect tensorrt",
    "build": "edgewright build resnet50 --calibration photos --backend openvino",
    "calibrate": "edgewright calibrate resnet50 --calibration photos --method entropy",
    "calibration check": "edgewright calibration check photos --model resnet50 --evaluation labelled",
    "compare": "edgewright compare build-before/resnet50 build/resnet50",
    "completion": 'eval "$(edgewright completion bash)"',
    "doctor": "edgewright doctor",
    "engine": "edgewright engine my_net.py:build --calibration photos --evaluation labelled",
    "explain": "edgewright explain mobilenet_effnet_b0 --dialect tensorrt",
    "export": "edgewright export resnet50 --opset 19",
    "fold": "edgewright fold mobilenet_effnet_b0",
    "inspect": "edgewright inspect resnet50 --plot resnet50.svg",
    "keygen": "edgewright keygen release",
    "models": "edgewright models",
    "pack": "edgewright pack mobilenet_effnet_b0 --sign release.key --archive",
    "quantize": "edgewright quantize mobilenet_effnet_b0 --method percentile-99.9",
    "report": "edgewright report build/mobilenet_effnet_b0",
    "run": "edgewright run photo.jpg --model mobilenet_effnet_b0 --top 3",
    "train": "edgewright train lenet --epochs 2",
    "unpack": "edgewright unpack lenet.edgewright --require-signature release.pub",
    "verify": "edgewright verify mobilenet_effnet_b0 --max-drop 0.1",
}
"""By the command's words."""

SHORT: dict[str, str] = {
    "audit": "What an engine file really runs, kernel by kernel.",
    "bench": "How fast an engine is here, in the words of trtexec.",
    "blame": "Which step from PyTorch to INT8 loses the accuracy.",
    "compare": "Hold one build against another: is it worse?",
    "engine": "Everything, from the network to proven engines.",
    "inspect": "What a network is made of, layer by layer.",
    "keygen": "Make a pair of keys to sign bundles with.",
    "models": "List the networks, and where their weights come from.",
    "pack": "Everything that engine does, and a bundle for devices.",
    "quantize": "Write the FP16 graph and the INT8 graphs.",
    "report": "Make the report of a finished build again.",
    "unpack": "Check a bundle of one file, and unpack it.",
    "verify": "Compare every engine with PyTorch, or with the bundle.",
}
"""In the list of commands, where the first sentence of the help is too long for a line of 80 columns."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what completes commands and options in SHELL.

    For good: add the line of the example to ~/.bashrc, with zsh to ~/.zshrc, with fish write the output to
    ~/.config/fish/completions/edgewright.fish.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    root = click.get_current_context().find_root().command
    assert kind is not None
    click.echo(kind(root, {}, "edgewright", COMPLETE_VARIABLE).source())


def commands_of(group: click.Group, words: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands below `group`, by their words: "engine", "calibration check"."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{words}{name} ")
        else:
            yield f"{words}{name}", command


def add_help(group: click.Group) -> None:
    """Below the help of every command; and a short sentence for the list of commands."""
    for words, command in commands_of(group):
        command.short_help = SHORT.get(words)
        command.epilog = f"\b\nExample:\n  {EXAMPLES[words]}"
