"""Names of layers against those of diffusers' and transformers' real models."""

import pytest
import torch

from ldm.checkpoint.diffusers_keys import Place, text_layers, unet_layers
from tests.golden_util import load_golden_keys
from tests.tiny_models import tiny_config, tiny_weights

UNET = "model.diffusion_model."
TEXT = "cond_stage_model."


def layers_of(family):
    names = load_golden_keys(family, UNET)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_layer_of_the_unet_has_its_own_name(family):
    layers = layers_of(family)
    found = unet_layers(layers)
    assert sorted(found.values()) == sorted(layers)
    assert found["conv_in"] == "input_blocks.0.0"
    assert found["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert found["down_blocks.3.resnets.1.conv1"] == "input_blocks.11.0.in_layers.2"
    assert found["mid_block.attentions.0.proj_in"] == "middle_block.1.proj_in"
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert found["up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"] == (
        "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0"
    )


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_names_and_shapes_are_those_of_diffusers(family):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -e .[test]")
    is_sd2 = family == "sd2"
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=1024 if is_sd2 else 768,
            attention_head_dim=(5, 10, 20, 20) if is_sd2 else 8,
            use_linear_projection=is_sd2,
        )
    theirs = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    shapes = load_golden_keys(family, UNET)
    ours = {
        f"{name}.{kind}": shapes[f"{layer}.{kind}"]
        for name, layer in unet_layers(layers_of(family)).items()
        for kind in ("weight", "bias")
        if f"{layer}.{kind}" in shapes
    }
    assert ours == theirs


def test_text_layers_of_sd1():
    found = text_layers(load_golden_keys("sd1", TEXT))
    layer = "text_model.encoder.layers.11.self_attn.q_proj"
    assert found[layer] == Place(f"transformer.{layer}.weight")


def test_text_layers_of_sd2():
    names = load_golden_keys("sd2", TEXT)
    found = text_layers(names)
    layer, block = "text_model.encoder.layers.22.", "model.transformer.resblocks.22."
    assert found[layer + "self_attn.v_proj"] == Place(block + "attn.in_proj_weight", 2, 3)
    assert found[layer + "mlp.fc2"] == Place(block + "mlp.c_proj.weight")
    assert len(found) == 24 * 8
    assert {place.name for place in found.values()} <= set(names)


@pytest.mark.parametrize("version", [1, 2])
def test_text_layers_of_small_models(version):
    weights = tiny_weights(tiny_config(version))
    found = text_layers(name.removeprefix(TEXT) for name in weights if name.startswith(TEXT))
    for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        place = found[f"text_model.encoder.layers.1.{layer}"]
        assert len(weights[TEXT + place.name]) % place.parts == 0
