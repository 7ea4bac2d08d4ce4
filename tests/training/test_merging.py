"""Token merging in training: no batch uses another one's plans."""

from __future__ import annotations

from typing import Any

import torch

from ldm.training.diffusion import DiffusionTraining
from ldm.util import instantiate_from_config
from tests.tiny_models import quiet_trainer, tiny_config


def plans_of(seen: list[Any]) -> list[torch.Tensor]:
    """What each batch's first block merges: the latents after its plan."""
    probe = torch.arange(64.0)[None, :, None]
    return [decision.plan.merge(probe) for decision in seen]


def test_each_batch_is_a_merging_run_of_its_own() -> None:
    tome = {"method": "random", "ratio": 0.5, "reuse_steps": 10, "max_downsample": 1}
    config = tiny_config(cond_stage_key="caption")
    config["model"]["params"]["unet_config"]["params"]["tome_config"] = tome
    model = instantiate_from_config(config["model"])
    merger = model.model.diffusion_model.tome
    seen: list[Any] = []
    merger.observer = lambda call, blocks: seen.append(blocks[0])
    latents = torch.randn(1, 4, 8, 8)
    batches = [{"latent": latents, "caption": ["a"]} for _ in range(3)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet_trainer(3).fit(DiffusionTraining(model), loader)
    merger.begin_call(8, 8, torch.zeros(1))  # the last call is observed, too
    first, second, third = plans_of(seen)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
