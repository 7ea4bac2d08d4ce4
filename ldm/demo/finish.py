"""From trained stages to a model folder."""

from __future__ import annotations

from pathlib import Path

from ldm.demo.export import write_model
from ldm.demo.recipe import Recipe
from ldm.demo.stages import checkpoint_of, note, weights_of, write_json
from ldm.device import choose_device
from ldm.errors import InputError


def choose(device: str) -> str:
    """``cpu`` or ``cuda``, from those or ``auto``."""
    return "cuda" if choose_device(device).type == "cuda" else "cpu"


def export_so_far(recipe: Recipe, state: Path, device: str, output: Path) -> None:
    """Write a model folder from the newest weights of every kind, and how they were made.

    Args:
        recipe: the recipe.
        state: the state folder.
        device: that was trained on.
        output: the model folder.

    Raises:
        InputError: the U-Net has not begun.
    """
    newest: dict[str, Path] = {}
    for stage in recipe.stages:
        checkpoint = checkpoint_of(state, stage)
        if weights_of(state, stage.name).is_file():
            newest[stage.export] = weights_of(state, stage.name)
        elif stage.export == "diffusion" and checkpoint is not None:
            newest[stage.export] = checkpoint
    if "diffusion" not in newest:
        raise InputError(f"--state {state}: its U-Net has not begun to train; let it run first")
    write_model(newest["diffusion"], newest["first_stage"], newest["classifier"], output)
    write_json(output / "made.json", note(recipe, state, device))
