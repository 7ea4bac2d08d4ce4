"""ControlNet files against diffusers' network on the same random weights."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_tensors_that_have_no_place_are_another_kind(files, tmp_path):
    """Of a network that also looks along time, say: without them it is another one."""
    _, path, original, unet = files
    more = {"down_blocks.0.motion_modules.0.proj_in.weight": torch.zeros(1)}
    save_file(load_file(path) | more, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match="of another kind: 1 of its tensors have no place"):
        load_controlnet(tmp_path / "more.safetensors", unet)
    state = torch.load(original)["state_dict"] | {"control_model.task_embedding": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(InputError, match="such as control_model"):
        load_controlnet(tmp_path / "more.pth", unet)


@pytest.mark.parametrize(
    ("name", "beside", "text"),
    [
        ("control_v11e_sd15_shuffle_fp16.safetensors", None, ""),
        ("control.safetensors", "control.yaml", "a:\n  global_average_pooling: True\n"),
        (
            "diffusion_pytorch_model.fp16.safetensors",
            "config.json",
            json.dumps({"global_pool_conditions": True}),
        ),
        (
            "diffusion_pytorch_model.safetensors",
            "config.json",
            json.dumps({"controlnet_conditioning_channel_order": "bgr"}),
        ),
    ],
)
def test_networks_that_are_run_in_another_way_are_refused(files, tmp_path, name, beside, text):
    """Their tensors are those of any other."""
    _, path, _, unet = files
    (tmp_path / "theirs").mkdir()
    shutil.copy(path, tmp_path / "theirs" / name)
    if beside:
        (tmp_path / "theirs" / beside).write_text(text)
    with pytest.raises(InputError, match=r"of another kind .*averaged") as caught:
        load_controlnet(tmp_path / "theirs" / name, unet)
    assert "\n" not in str(caught.value)


def test_a_usual_configuration_beside_it_changes_nothing(files, tmp_path):
    net, path, _, unet = files
    net.save_config(tmp_path / "theirs")
    for name in ("diffusion_pytorch_model.safetensors", "control.safetensors"):
        shutil.copy(path, tmp_path / "theirs" / name)
        (tmp_path / "theirs" / "control.yaml").write_text("a: {global_average_pooling: false}")
        load_controlnet(tmp_path / "theirs" / name, unet)
