"""Training a text encoder on captions, at a tiny size."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ldm.demo.captions import CaptionReader
from ldm.demo.rendered import SceneCaptions
from ldm.demo.scenes import ATTRIBUTES
from ldm.training.module import Training
from tests.tiny_models import CLIP, quiet_trainer

ENCODER = {**CLIP, "params": {**CLIP["params"], "freeze": False}}


def train(model, n_steps, learning_rate=1e-3):
    loader = DataLoader(SceneCaptions(64 * n_steps, seed=1), batch_size=64)
    trainer = quiet_trainer(n_steps)
    trainer.fit(Training(model, learning_rate), loader)
    return trainer.callback_metrics


def test_it_learns_what_captions_say():
    torch.manual_seed(0)
    model = CaptionReader(ENCODER, ATTRIBUTES)
    captions = ["the sea at noon, a clear sky", "the sea at night, a clear sky"]
    before = model.cond_stage_model(captions).detach()
    metrics = train(model, 150, 1e-2)
    assert metrics["train/time"] > 0.7  # chance is about 0.2
    after = model.cond_stage_model(captions).detach()
    apart = [(pair[0] - pair[1]).mean(0).norm() for pair in (before, after)]
    assert apart[1] > 2 * apart[0]


def test_it_starts_from_weights_and_keeps_near_them(tmp_path):
    torch.manual_seed(0)
    first = CaptionReader(ENCODER, ATTRIBUTES)
    state = first.cond_stage_model.state_dict()
    path = tmp_path / "text.safetensors"
    save_file({f"cond_stage_model.{name}": value for name, value in state.items()}, path)
    captions = ["pine trees on snowy hills at dawn, the sun on the left, a clear sky"]
    moved = []
    for keep in (0.0, 100.0):
        torch.manual_seed(1)
        model = CaptionReader(ENCODER, ATTRIBUTES, str(path), keep)
        start = copy.deepcopy(model.cond_stage_model)(captions)
        torch.testing.assert_close(start, first.cond_stage_model(captions))
        train(model, 5)
        moved.append((model.cond_stage_model(captions) - start).square().mean().item())
    assert moved[1] < 0.5 * moved[0]


def test_the_encoder_has_a_latent_diffusion_model_s_names():
    names = CaptionReader(ENCODER, ATTRIBUTES).state_dict()
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in names
    assert all(name.startswith(("cond_stage_model.", "heads.")) for name in names)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_configuration_has_the_scenes_attributes(name):
    from ldm.config import load_config, shipped

    params = load_config([shipped("configs/demo/text.yaml")], [])["model"]["params"]
    assert tuple(params["attributes"][name]) == ATTRIBUTES[name]
