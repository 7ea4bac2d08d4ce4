"""Weights on their way from a checkpoint to the next stage, and to the shipped model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.convert import COMPONENTS, convert
from ldm.checkpoint.files import open_state_dict
from ldm.util import part_of

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
    with TemporaryDirectory(dir=output.parent) as scratch:
        flat, joined = Path(scratch, "flat.safetensors"), Path(scratch, "joined.safetensors")
        convert(diffusion, flat, ema=diffusion.suffix == ".ckpt", parameterization="v")
        own = {k: v for k, v in load_file(flat).items() if k.startswith(tuple(COMPONENTS.values()))}
        save_file(own | load_file(first_stage), joined, {"modelspec.prediction_type": "v"})
        parts = convert(joined, Path(scratch, "parts"), half=True, parameterization="v", split=15.5)
        for old in output.glob("*.safetensors"):
            old.unlink()
        for part in parts.iterdir():
            part.replace(output / part.name)
    (output / "classifier").mkdir(exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(classifier).items()}
    with part_of(output / "classifier" / "attributes.safetensors") as file:
        save_file(halves, file)
