"""From trained stages to a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from ldm.cli import txt2img
from ldm.demo import check_program
from ldm.demo.export import write_model
from ldm.demo.recipe import Recipe
from ldm.demo.stages import checkpoint_of, note, weights_of, write_json
from ldm.device import choose_device
from ldm.errors import InputError

CONFIG = "configs/demo/unet.yaml"


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


def finish(recipe: Recipe, state: Path, device: str, output: Path) -> None:
    """Write the finished model, measure it, and draw with it.

    The report goes into its ``made.json``; report and pictures are in the state folder.

    Args:
        recipe: the recipe.
        state: the state folder.
        device: that was trained on.
        output: the model folder.
    """
    export_so_far(recipe, state, device, output)
    model = [f"--ckpt={output}", f"--config={CONFIG}"]
    if recipe.check:
        judge = f"--classifier={output / 'classifier' / 'attributes.safetensors'}"
        outdir = state / "check"
        check_program.main([*model, judge, f"--outdir={outdir}", *recipe.check])
        made = json.loads((output / "made.json").read_text(encoding="utf-8"))
        report = json.loads((outdir / "report.json").read_text(encoding="utf-8"))
        write_json(output / "made.json", {**made, "check": report})
    if recipe.pictures:
        txt2img.main([*model, f"--outdir={state / 'pictures'}", *recipe.pictures])
