"""Weights on their way from a checkpoint to the next stage, and to the shipped model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.convert import COMPONENTS, convert
from ldm.checkpoint.files import open_state_dict
from ldm.demo.rendered import picture_of
from ldm.images import to_unit
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import folder_beside, part_of

N_LEVELLING = 128  # renders that the latents' mean and deviation are taken from
# Kind of stage -> beginnings of names in its checkpoint -> beginnings of what it hands on.
RENAMES = {
    "classifier": {"": ""},
    "first_stage": {
        f"{part}.": f"first_stage_model.{part}."
        for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")
    },
    "text": {"cond_stage_model.": "cond_stage_model."},
}


def export_stage(kind: str, checkpoint: Path, carried: Sequence[Path], target: Path) -> None:
    """Write what a stage hands on.

    Args:
        kind: classifier, first_stage, text or diffusion (whose averaged weights are taken).
        checkpoint: of the stage.
        carried: weights of earlier stages to hand on with them.
        target: .safetensors; written whole or not at all.
    """
    target.parent.mkdir(exist_ok=True)
    if kind == "diffusion":
        convert(checkpoint, target, ema=True, parameterization="v", force=True)
        return
    tensors: dict[str, Tensor] = {}
    for path in carried:
        tensors |= load_file(path)
    tensors |= renamed(checkpoint, RENAMES[kind])
    with part_of(target) as part:
        save_file(tensors, part)


def level_latents(path: Path, config: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """Give the latents of a first stage's weights mean 0 and deviation 1/scale_factor by channel.

    Folded into the two 1x1 convolutions around the latents: the pictures stay the same, and the
    diffusion model has the latents' scale as a constant, as Stable Diffusion has.

    Args:
        path: weights under ``first_stage_model.``; rewritten.
        config: of the stage that trained them.
        scale_factor: of the diffusion model.

    Returns: means and deviations before, by channel.
    """
    weights = load_file(path)
    prefix = "first_stage_model."
    params = {**config["model"]["params"], "lossconfig": {"target": "torch.nn.Identity"}}
    params.pop("ckpt_path", None)
    model = AutoencoderKL(**params).eval()
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
    size = config["data"]["params"]["train"]["params"]["size"]
    latents = []
    with torch.no_grad():
        for index in range(N_LEVELLING):
            picture = torch.from_numpy(to_unit(picture_of(index, 0, "train", size)[None]))
            latents.append(model.encode(picture).mode())
    z = torch.cat(latents)
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
    gain = 1 / (deviation * scale_factor)
    n = len(mean)
    out, back = prefix + "quant_conv.", prefix + "post_quant_conv."
    weights[out + "weight"][:n] *= gain[:, None, None, None]
    weights[out + "bias"][:n] = (weights[out + "bias"][:n] - mean) * gain
    weights[out + "bias"][n:] += 2 * gain.log()
    kernel = weights[back + "weight"]
    weights[back + "bias"] += (kernel * mean[:, None, None]).sum((1, 2, 3))
    weights[back + "weight"] = kernel / gain[:, None, None]
    with part_of(path) as part:
        save_file(weights, part)
    return {"mean": mean.tolist(), "deviation": deviation.tolist()}


def renamed(checkpoint: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of a checkpoint whose names begin in a certain way, under other beginnings."""
    weights = open_state_dict(checkpoint)
    return {
        new + name.removeprefix(old): weights[name].contiguous().clone()
        for name in weights
        for old, new in names.items()
        if name.startswith(old) and weights[name].is_floating_point()
    }


def write_model(diffusion: Path, first_stage: Path, classifier: Path, output: Path) -> None:
    """Write a model folder of half-precision files below 16 MB.

    Args:
        diffusion: weights, or a checkpoint with averaged weights, of U-Net and text encoder.
        first_stage: weights of the first stage.
        classifier: weights of the classifier.
        output: folder; its weights are replaced.
    """
    output.mkdir(parents=True, exist_ok=True)
    with folder_beside(output.absolute()) as scratch:
        flat, joined = scratch / "flat.safetensors", scratch / "joined.safetensors"
        convert(diffusion, flat, ema=diffusion.suffix == ".ckpt", parameterization="v")
        own = {k: v for k, v in load_file(flat).items() if k.startswith(tuple(COMPONENTS.values()))}
        save_file(own | load_file(first_stage), joined, {"modelspec.prediction_type": "v"})
        parts = convert(joined, scratch / "parts", half=True, parameterization="v", split=15.5)
        for old in output.glob("*.safetensors"):
            old.unlink()
        for part in parts.iterdir():
            part.replace(output / part.name)
    (output / "classifier").mkdir(exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(classifier).items()}
    with part_of(output / "classifier" / "attributes.safetensors") as file:
        save_file(halves, file)
