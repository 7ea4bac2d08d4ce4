"""The recipe of the demo model, at toy size: every stage takes two steps."""

import json

from pathlib import Path

import pytest
from safetensors.torch import load_file

import ldm.demo.recipe as module
from ldm.training import run as train
from ldm.demo.recipe import Recipe, Stage, alone, check_hours, check_state, run_stages, seconds_for
from ldm.errors import InputError

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests/demo/toy_recipe.yaml"


def train_here(arguments, device, lock):
    """Train in this process: starting one takes longer than two steps."""
    train.main(arguments)
    return 0


def test_the_whole_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "launch", train_here)
    recipe, state = Recipe.load(TOY), tmp_path / "state"
    check_state(state, recipe.disk_gb)
    with alone(state) as lock:
        assert run_stages(recipe, state, "cpu", 0.1, 1e6, lock)
    made = json.loads((state / "made.json").read_text())
    assert [stage["steps"] for stage in made["stages"].values()] == [2] * len(recipe.stages)
    print(made)
