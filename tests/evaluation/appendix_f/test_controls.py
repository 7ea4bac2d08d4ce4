import json

import pytest
import torch

from ldm.evaluation.appendix_f.controls import CONTROLS, DropPlan, control
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.golden_util import fill_parameters, load_golden


@pytest.fixture(scope="module")
def unet():
    _, metadata = load_golden("unet_sd1")
    model = UNetModel(**json.loads(metadata["config"])).eval()
    return fill_parameters(model, int(metadata["fill_seed"]))


@torch.no_grad()
def test_controls_change_the_output_and_leave_no_trace(unet):
    tensors, _ = load_golden("unet_sd1")
    call = (tensors["x"], tensors["timesteps"], tensors["context"])
    plain = unet(*call)
    outputs = [plain]
    for name in CONTROLS:
        with control(unet, name):
            outputs.append(unet(*call))
        assert torch.equal(unet(*call), plain)
    distances = torch.stack([(a - b).abs().max() for a in outputs for b in outputs if a is not b])
    assert distances.min() > 1e-4


@torch.no_grad()
def test_random_choices_follow_the_seed(unet):
    tensors, _ = load_golden("unet_sd1")
    call = (tensors["x"], tensors["timesteps"], tensors["context"])
    results = []
    for seed in (1, 1, 2):
        with control(unet, "random", seed=seed):
            results.append(unet(*call))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_drop_gives_the_dropped_nothing():
    kept = torch.tensor([0, 2])
    plan = DropPlan(n_tokens=3, n_kept=2, counts=torch.ones(1, 2), groups=kept, kept=kept)
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert plan.merge(x).flatten().tolist() == [1, 3]
    assert plan.unmerge(plan.merge(x)).flatten().tolist() == [1, 0, 3]


def test_unknown_control(unet):
    with (
        pytest.raises(ValueError, match="'all' is not one of none, random, drop"),
        control(unet, "all"),
    ):
        pass
