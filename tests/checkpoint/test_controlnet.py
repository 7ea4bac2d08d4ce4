"""ControlNet files against diffusers' network on the same random weights."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.controlnet import load_controlnet
from ldm.errors import InputError
from tests.golden_util import fill_parameters
from tests.tiny_models import UNET, tiny_config

UNETS = {
    version: tiny_config(version)["model"]["params"]["unet_config"]["params"] for version in (1, 2)
}


def their_net(version):
    heads = {"attention_head_dim": 2}  # which stands for the number of heads
    if version == 2:
        heads = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    net = diffusers.ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=UNET["context_dim"],
        **heads,
    )
    return fill_parameters(net, seed=5).eval()


@pytest.fixture(params=[1, 2])
def files(request, tmp_path):
    """One network in both layouts, and diffusers' own object."""
    net = their_net(request.param)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    ours = load_controlnet(tmp_path / "theirs.safetensors", UNETS[request.param])
    wrapped = {f"control_model.{name}": tensor for name, tensor in ours.state_dict().items()}
    wrapped["first_stage_model.quant_conv.bias"] = torch.zeros(8)
    torch.save({"state_dict": wrapped}, tmp_path / "original.pth")
    return net, tmp_path / "theirs.safetensors", tmp_path / "original.pth", UNETS[request.param]


@torch.no_grad()
def test_both_layouts_equal_diffusers_network(files):
    theirs, *paths, unet = files
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    hint, t = torch.rand(2, 3, 64, 64), torch.tensor([10, 700])
    down, middle = theirs(x, t, context, controlnet_cond=hint, return_dict=False)
    for path in paths:
        found = load_controlnet(path, unet).residuals(x, hint, t, context)
        for ours, expected in zip(found, [*down, middle], strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def test_files_for_other_models_are_refused(files, tmp_path):
    _, path, original, unet = files
    with pytest.raises(InputError, match=r"a ControlNet for another model: .* is"):
        load_controlnet(path, {**unet, "context_dim": 24})
    with pytest.raises(InputError, match="for another model, or a part of one: it has no"):
        load_controlnet(original, {**unet, "channel_mult": [1, 2, 4]})
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is no ControlNet"):
        load_controlnet(tmp_path / "other.safetensors", unet)
    save_file({"difference": torch.zeros(0)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="what a ControlNet differs from its model by"):
        load_controlnet(tmp_path / "other.safetensors", unet)
