"""The U-Net with each way of merging, against the published implementations' numbers."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.config import ToMeConfig
from tests.golden_util import fill_parameters, load_golden

GOLDEN, METADATA = load_golden("tome_unet")
CONFIGS = json.loads(METADATA["tome_configs"])


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    model = UNetModel(**json.loads(METADATA["config"]))
    return fill_parameters(model, int(METADATA["fill_seed"])).eval()


@torch.no_grad()
def run(unet: UNetModel, config: dict | None) -> torch.Tensor:
    unet.tome.configure(ToMeConfig.from_mapping(config))
    return unet(GOLDEN["x"], GOLDEN["timesteps"], context=GOLDEN["context"])


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(unet: UNetModel, name: str) -> None:
    out = run(unet, CONFIGS[name])
    torch.testing.assert_close(out, GOLDEN[name], rtol=1e-4, atol=1e-4)
    assert not torch.equal(out, run(unet, None))


def test_off(unet: UNetModel) -> None:
    torch.testing.assert_close(run(unet, None), GOLDEN["off"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"ratio": 0},
        {"r": 0},
        {"method": "kth", "k": 1},
        {"ratio": 0.0, "apply_to": ["block"]},
        {"ratio": 0.5, "min_tokens": 100_000},
        {"steps": [[0, 0], [1, 0]]},
    ],
)
def test_nothing_to_merge_is_bit_identical(unet: UNetModel, config: dict) -> None:
    assert torch.equal(run(unet, config), run(unet, None))


@pytest.mark.parametrize("config", [{"ratio": 0.5}, {"method": "kth", "k": 3}])
def test_an_empty_batch_stays_one(unet: UNetModel, config: dict) -> None:
    unet.tome.configure(ToMeConfig.from_mapping(config))
    x, timesteps, context = (GOLDEN[name][:0] for name in ("x", "timesteps", "context"))
    assert unet(x, timesteps, context=context).shape == x.shape


def test_no_batch_in_training_meets_the_plans_of_another(unet: UNetModel) -> None:
    unet.tome.configure(ToMeConfig.from_mapping({"ratio": 0.5, "reuse_steps": 100}))
    seen = []
    unet.tome.observer = lambda _, blocks: seen.append(blocks[0].plan)
    try:
        unet.train()
        for _ in range(2):
            unet(GOLDEN["x"], GOLDEN["timesteps"], context=GOLDEN["context"])
        unet.eval()
        with torch.no_grad():
            for _ in range(2):
                unet(GOLDEN["x"], GOLDEN["timesteps"], context=GOLDEN["context"])
    finally:
        unet.eval()
        unet.tome.observer = None
    assert seen[0] is not seen[1]
    assert seen[2] is seen[3]
