"""The recipe of the demo model, at toy size: every stage takes two steps."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ldm.demo.stages as module
from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.load import load_model
from ldm.config import load_config
from ldm.demo import check, export, make
from ldm.demo.export import level_latents
from ldm.demo.finish import export_so_far, finish
from ldm.demo.quality import renders
from ldm.demo.recipe import Recipe, alone, check_output, check_state
from ldm.demo.stages import check_keys, progress_of, run_stages, seconds_for, stage_config
from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.training import run as train
from ldm.training.check import check_sections
from ldm.util import instantiate_from_config

TOY = Path(__file__).parent / "toy_recipe.yaml"


def train_here(arguments, device, lock, n_processes):
    """Train in this process: starting one takes longer than two steps."""
    train.main(arguments)
    return 0


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(module, "launch", train_here)
    return Recipe.load(TOY)


def run(recipe, state, this_call=1e6):
    with alone(state) as lock:
        return run_stages(recipe, state, "cpu", 0.1, this_call, lock)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    state = tmp_path_factory.mktemp("toy") / "state"
    recipe = Recipe.load(TOY)
    check_state(state, recipe.disk_gb)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", train_here)
        patch.setattr(export, "N_LEVELLING", 4)
        assert run(recipe, state)
    return state


def test_the_whole_chain(finished, tmp_path, monkeypatch):
    for name, few in {
        "classifier_accuracy": partial(check.classifier_accuracy, n=32),
        "first_stage_quality": partial(check.first_stage_quality, n=2),
        "train_finder": partial(check.train_finder, 2, 2),
        "check": partial(check.check, n_training=4),
    }.items():
        monkeypatch.setattr(check, name, few)
    recipe = Recipe.load(TOY)
    finish(recipe, finished, "cpu", tmp_path / "model")
    made = json.loads((tmp_path / "model" / "made.json").read_text())
    assert list(made["stages"]) == [stage.name for stage in recipe.stages]
    for stage in made["stages"].values():
        assert (stage["steps"], stage["is_over"]) == (2, True)
        assert stage["seconds"] > 0
        assert stage["pictures"] >= 4
        assert any(name.endswith("loss") for name in stage["losses"])
    assert made["check"]["pixels"] == 64
    assert len(list((finished / "pictures" / "samples").glob("*.png"))) == 1
    sizes = [file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert max(sizes) < 16e6
    assert sum(sizes) < 40e6
    model = load_model(tmp_path / "model")  # which configuration it has is seen in the weights
    assert model.first_stage_model.f == 8
    assert model.parameterization == "v"
    averaged = load_file(finished / "weights" / "large.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    torch.testing.assert_close(
        model.state_dict()[name].float(), averaged[name], atol=1e-3, rtol=1e-3
    )
    assert (tmp_path / "model" / "classifier" / "attributes.safetensors").is_file()


def test_the_decoder_alone_is_tuned(finished):
    whole, decoder = (
        load_file(finished / "weights" / f"{name}.safetensors") for name in ("whole", "decoder")
    )
    changed = {name for name in whole if not torch.equal(whole[name], decoder[name])}
    assert any(name.startswith("first_stage_model.decoder.") for name in changed)
    assert not any(name.startswith("first_stage_model.encoder.") for name in changed)


def test_latents_are_levelled_and_pictures_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "N_LEVELLING", 16)
    config = load_config("configs/demo/crops.yaml", ["data.params.train.params.size=64"])
    config["model"]["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    model = AutoencoderKL(**config["model"]["params"]).eval()
    path = tmp_path / "a.safetensors"
    save_file({f"first_stage_model.{k}": v for k, v in model.state_dict().items()}, path)
    x = renders(2, 64)
    before = model.encode(x)
    picture = model.decode(before.mode())
    found = level_latents(path, config, 0.18215)
    weights = {k.removeprefix("first_stage_model."): v for k, v in load_file(path).items()}
    model.load_state_dict(weights)
    after = model.encode(x)
    gain = 1 / (0.18215 * torch.tensor(found["deviation"]).reshape(1, -1, 1, 1))
    mean = torch.tensor(found["mean"]).reshape(1, -1, 1, 1)
    torch.testing.assert_close(after.mode(), (before.mode() - mean) * gain, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(after.std, before.std * gain)
    torch.testing.assert_close(model.decode(after.mode()), picture, atol=1e-4, rtol=1e-3)
    level = level_latents(path, config, 0.18215)
    torch.testing.assert_close(torch.tensor(level["deviation"]), torch.full((4,), 1 / 0.18215))


def test_a_stopped_run_goes_on(toy, tmp_path, monkeypatch):
    recipe = replace(toy, stages=[stage for stage in toy.stages if stage.name == "text"])
    recipe = replace(recipe, stages=[replace(recipe.stages[0], carries=())])
    state = tmp_path / "state"
    state.mkdir()
    endless = {"text": ["lightning.trainer.max_steps=-1", "data.params.batch_size=2"]}
    assert not run(replace(recipe, overrides=endless), state, this_call=2)
    first = progress_of(state, recipe.stages[0])
    n = first["steps"]
    assert n >= 1
    assert not first["is_over"]
    two_more = {"text": [f"lightning.trainer.max_steps={n + 2}", "data.params.batch_size=2"]}
    assert run(replace(recipe, overrides=two_more), state)
    second = progress_of(state, recipe.stages[0])
    assert (second["steps"], second["pictures"]) == (n + 2, 2 * n + 4)
    assert second["seconds"] > first["seconds"]
    started = SimpleNamespace(count=0)
    monkeypatch.setattr(module, "launch", lambda *_: started.__setattr__("count", 1))
    assert run(recipe, state)  # all is done
    assert started.count == 0


@pytest.mark.slow
def test_two_processes_share_a_stage(tmp_path):
    recipe = Recipe.load(TOY)
    stage = replace(next(s for s in recipe.stages if s.name == "text"), processes=2, carries=())
    state = tmp_path / "state"
    check_state(state, recipe.disk_gb)
    assert run(replace(recipe, stages=[stage]), state)
    progress = progress_of(state, stage)
    assert (progress["steps"], progress["pictures"]) == (2, 8)  # two of each process
    assert progress["is_over"]


@pytest.mark.slow
def test_two_processes_that_are_stopped_show_no_traceback(tmp_path):
    start = [sys.executable, "-c", module.LAUNCHER, "--standalone", "--nproc-per-node=2"]
    waiting = ["--no-python", "sh", "-c", 'touch "$0/$RANK"; exec sleep 60', str(tmp_path)]
    with subprocess.Popen([*start, *waiting], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        process.terminate()
        said = process.communicate()[1]
    assert process.returncode == 143
    assert "Traceback" not in said


def test_another_recipes_state_is_refused_by_name(toy, finished, tmp_path):
    shutil.copytree(finished / "text", tmp_path / "text")
    wider = [*toy.overrides["all"], "model.params.cond_stage_config.params.max_length=76"]
    other = replace(toy, overrides={**toy.overrides, "text": wider})
    with pytest.raises(InputError, match="its stage 'text' is of another recipe"):
        check_keys(other, tmp_path, "cpu")
    faster = {**toy.overrides, "text": ["model.base_learning_rate=1"]}  # may be tuned on the way
    check_keys(replace(toy, overrides=faster), tmp_path, "cpu")


def test_a_stages_time_is_its_share_of_what_is_left(toy, finished, tmp_path):
    hours = 2.0
    first, second = toy.stages[:2]
    assert seconds_for(toy, first, tmp_path, hours) == pytest.approx(7200 / len(toy.stages))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / f"{first.name}.safetensors").touch()
    folder = tmp_path / first.name / "x_run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    (folder / "progress.json").write_text('{"seconds": 1200}')
    expected = (7200 - 1200) / (len(toy.stages) - 1)
    assert seconds_for(toy, second, tmp_path, hours) == pytest.approx(expected)


def test_a_recipe_of_other_models_leaves_the_demo_alone(finished, tmp_path, monkeypatch):
    state = tmp_path / "state"
    shutil.copytree(finished, state)
    made = (state / "made.json").read_bytes()
    stage = {"files": ["unet.yaml", "../study/narrow.yaml"], "starts_from": "text"}
    stage |= {"share": 1, "export": "diffusion"}
    toy = yaml.safe_load(TOY.read_text())
    changes = {"all": toy["overrides"]["all"], "narrow": toy["overrides"]["unet"]}
    recipe = {"hours": 0.1, "hours_cuda": 0.1, "disk_gb": 0.1, "overrides": changes}
    recipe |= {"log": "models.json", "writes_model": False, "stages": {"narrow": stage}}
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(module, "launch", train_here)
    flags = ["--recipe", str(path), "--state", str(state), "--output", str(tmp_path / "demo")]
    make.main([*flags, "--device", "cpu"])
    assert (state / "made.json").read_bytes() == made
    assert not (tmp_path / "demo").exists()
    narrow = load_model(state / "weights" / "narrow.safetensors")
    assert narrow.model.diffusion_model.model_channels == 32


@pytest.mark.parametrize("name", ["models", "trials"])
def test_recipes_of_the_study_can_be_followed(name, tmp_path):
    recipe = Recipe.load(f"configs/study/{name}.yaml")
    configs = [stage_config(recipe, stage, tmp_path, "cpu")[2] for stage in recipe.stages]
    for stage, config in zip(recipe.stages, configs, strict=True):
        check_sections(config)
        if stage.export == "diffusion":
            starts_from = f"{stage.starts_from}.safetensors" if stage.starts_from else "models/demo"
            assert config["model"]["params"]["ckpt_path"].endswith(starts_from)
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(recipe.stages)


def test_a_model_of_the_study_takes_all_but_the_unet_from_the_demo(tmp_path):
    recipe = Recipe.load("configs/study/models.yaml")
    seed = next(stage for stage in recipe.stages if stage.name == "seed_small")
    config = stage_config(recipe, seed, tmp_path, "cpu")[2]
    assert config["shared"]["first_stage"] == "models/demo/first_stage.safetensors"
    begun = instantiate_from_config(config["model"]).state_dict()
    demo = open_state_dict("models/demo")
    same = {name for name in demo if torch.equal(begun[name].half(), demo[name])}
    assert {name for name in demo if name.startswith(("first_stage", "cond_stage"))} <= same
    assert "model.diffusion_model.input_blocks.0.0.weight" in {*demo} - same


def test_a_state_in_use_is_refused(tmp_path):
    with alone(tmp_path), pytest.raises(InputError, match="in use by another run"), alone(tmp_path):
        pass


def test_a_failed_stage_ends_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "launch", lambda *_: 1)
    with pytest.raises(InputError, match="stage 'classifier' ended with exit code 1"):
        run(toy, tmp_path)


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "soon"])
def test_minutes_that_are_none(minutes, tmp_path):
    with pytest.raises(InputError, match="--minutes-per-call"):
        make.main(["--minutes-per-call", minutes, "--state", str(tmp_path / "state")])
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("hours", ["0.01", "-1", "nan", "inf", "soon"])
def test_hours_that_are_none(hours, tmp_path):
    with pytest.raises(InputError, match="hours"):
        make.main(["--hours", hours, "--state", str(tmp_path / "state")])
    assert not (tmp_path / "state").exists()


def test_too_little_disk_is_said_before_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs 9 GB, 8\.0 GB more than its disk has free"):
        check_state(tmp_path, 9)


@pytest.mark.skipif(os.name == "nt", reason="folders have no such permissions there")
def test_a_state_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be written to"):
        check_state(tmp_path / "file", 0.1)


def test_a_recipe_that_is_none(tmp_path):
    (tmp_path / "x.yaml").write_text("hours: 1\nstages: {a: {colour: red}}\n")
    with pytest.raises(InputError, match=r"x\.yaml is no recipe: .*colour"):
        Recipe.load(tmp_path / "x.yaml")
    for text, message in {
        "hours: soon\nhours_cuda: 1\ndisk_gb: 1\nstages: {}": "hours 'soon': must be a number",
        "stages: [a, b]": "stages .*must be 'key: value' pairs",
    }.items():
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"x\.yaml is no recipe: .*{message}"):
            Recipe.load(tmp_path / "x.yaml")


@pytest.mark.parametrize("flag", ["--output", "--export"])
def test_a_folder_of_other_weights_is_left_alone(flag, tmp_path):
    """It is said before anything is trained."""
    other = tmp_path / "models" / "sd-v1-5.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"weights")
    state = tmp_path / "state"
    with pytest.raises(InputError, match=rf"{flag} .*other weights, too \(sd-v1-5\.safetensors\)"):
        make.main([flag, str(other.parent), "--state", str(state)])
    with pytest.raises(InputError, match=f"{flag} .*cannot write there"):
        make.main([flag, str(other), "--state", str(state)])
    assert not state.exists()
    (other.parent / "unet-1.safetensors").touch()
    other.unlink()
    check_output(str(other.parent), flag)


def test_nothing_to_export_yet(tmp_path):
    with pytest.raises(InputError, match="has not begun to train"):
        export_so_far(Recipe.load(TOY), tmp_path, "cpu", tmp_path / "model")


def test_the_shipped_recipe_is_whole(tmp_path):
    recipe = Recipe.load()
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1)
    for device in ("cpu", "cuda"):
        assert len(set(check_keys(recipe, tmp_path, device).values())) == len(recipe.stages)
