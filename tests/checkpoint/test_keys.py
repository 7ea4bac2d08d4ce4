import pytest

from ldm.checkpoint import keys
from ldm.config import load_config
from ldm.errors import InputError
from tests.golden_util import load_golden_keys

UNET = keys.UNET
IN = f"{UNET}input_blocks.0.0.weight"
TO_K = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
CONFIGS = {
    "sd1": "v1-inference",
    "sd1-inpainting": "v1-inpainting-inference",
    "sd2": "v2-inference",
    "sd2-inpainting": "v2-inpainting-inference",
}


def shapes_of(family):
    shapes = load_golden_keys(family.removesuffix("-inpainting"))
    if family.endswith("inpainting"):
        shapes[IN] = (320, 9, 3, 3)
    return shapes


def config_of(family):
    return load_config(f"configs/stable-diffusion/{CONFIGS[family]}.yaml")


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        (
            "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.weight",
            "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
        ),
        (
            "cond_stage_model.transformer.embeddings.token_embedding.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        ),
        (
            "cond_stage_model.transformer.final_layer_norm.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        ),
        (
            "conditioner.embedders.0.model.ln_final.weight",
            "cond_stage_model.model.ln_final.weight",
        ),
        (
            "conditioner.embedders.0.transformer.encoder.layers.0.mlp.fc1.bias",
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        ),
    ],
)
def test_foreign_spellings_are_translated(stored, ours):
    assert keys.canonical_name(stored) == ours


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_upstreams_names_stay(family):
    names = load_golden_keys(family)
    assert [keys.canonical_name(name) for name in names] == list(names)


def test_ema_names_have_no_dots():
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert keys.ema_name(name) == "model_ema.diffusion_modelinput_blocks00weight"


def test_counters_alone_are_no_ema():
    assert not keys.has_ema(["model_ema.decay", "model_ema.num_updates"])
    assert keys.has_ema(["model_ema.diffusion_modelout2bias"])


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modelout2bias",
        "logvar",
        "betas",
        "posterior_mean_coef2",
        "lvlb_weights",
        "first_stage_model.loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.transformer.text_projection.weight",
    ],
)
def test_harmless(name):
    assert keys.is_harmless(name)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_no_weight_is_harmless(family):
    for name in load_golden_keys(family):
        is_weight = name.startswith(tuple(keys.COMPONENTS)) and "position_ids" not in name
        assert keys.is_harmless(name) == (not is_weight), name


def test_idle_text_tensors_of_sd2():
    names = load_golden_keys("sd2")
    idle = keys.idle_text_names(names, config_of("sd2")["model"]["params"]["cond_stage_config"])
    prefix = "cond_stage_model.model."
    blocks = {name for name in names if f"{prefix}transformer.resblocks.23." in name}
    assert len(blocks) == 12
    assert idle == blocks | {f"{prefix}text_projection", f"{prefix}logit_scale"}


def test_sd1_has_no_idle_text_tensors():
    config = config_of("sd1")["model"]["params"]["cond_stage_config"]
    assert keys.idle_text_names(load_golden_keys("sd1"), config) == set()


# --- families ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_family_and_the_one_configuration_that_fits(family):
    shapes = shapes_of(family)
    keys.refuse_other_families(shapes, "x.ckpt")
    assert keys.family(shapes) == family
    assert keys.input_channels(shapes) == (9 if "inpainting" in family else 4)
    for other in CONFIGS:
        assert (keys.misfit(config_of(other), shapes) is None) == (other == family)


@pytest.mark.parametrize(
    ("section", "key", "value", "what"),
    [
        ("unet_config", "model_channels", 192, "model_channels"),
        ("unet_config", "channel_mult", [1, 2, 4], "number of input blocks"),
        ("unet_config", "num_res_blocks", 3, "number of input blocks"),
        ("unet_config", "use_linear_in_transformer", True, "use_linear_in_transformer"),
        ("first_stage_config", "embed_dim", 3, "embed_dim"),
        ("first_stage_config", "ddconfig", {"ch_mult": [1, 2, 4]}, "number of levels"),
    ],
)
def test_misfit_sees_each_part(section, key, value, what):
    config = config_of("sd1")
    config["model"]["params"][section]["params"][key] = value
    assert what in keys.misfit(config, shapes_of("sd1"))


def test_misfit_sees_the_text_encoder():
    config = config_of("sd1")
    config["model"]["params"]["cond_stage_config"] = config_of("sd2")["model"]["params"][
        "cond_stage_config"
    ]
    assert "open_clip for the text encoder" in keys.misfit(config, shapes_of("sd1"))


@pytest.mark.parametrize("config", [{}, {"model": {"params": {"unet_config": {}}}}])
def test_configuration_of_something_else(config):
    with pytest.raises(InputError, match="no latent-diffusion model"):
        keys.misfit(config, shapes_of("sd1"))


def test_small_model_is_custom():
    assert keys.family({IN: (32, 4, 3, 3), TO_K: (32, 768)}) == "custom"


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({IN: (320, 4, 3, 3), TO_K: (640, 2048)}, "an SDXL model"),
        ({"conditioner.embedders.1.model.ln_final.bias": (1280,)}, "an SDXL model"),
        ({IN: (384, 4, 3, 3), TO_K: (768, 1280)}, "an SDXL refiner"),
        ({IN: (256, 7, 3, 3), TO_K: (256, 1024)}, "a Stable Diffusion x4 upscaler"),
        ({IN: (320, 5, 3, 3), TO_K: (320, 1024)}, "a Stable Diffusion 2 depth model"),
        ({IN: (320, 8, 3, 3), TO_K: (320, 768)}, "an instruct-pix2pix model"),
        ({IN: (320, 4, 3, 3), f"{UNET}label_emb.0.0.weight": (1280, 2048)}, "Stable unCLIP"),
        ({f"{UNET}joint_blocks.0.x": (1,)}, "a Stable Diffusion 3 model"),
        ({"double_blocks.0.img_mod.lin.weight": (1,)}, "a FLUX model"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1,)}, "a LoRA"),
        ({"unet.down_blocks.0.to_k.lora_A.weight": (1,)}, "a LoRA"),
        ({"control_model.input_blocks.0.0.weight": (1,), IN: (320, 4, 3, 3)}, "a ControlNet"),
        ({"input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
        ({"down_blocks.0.motion_modules.0.x": (1,)}, "an AnimateDiff motion module"),
        ({IN: (320, 4, 3, 3), f"{UNET}scaled_fp8": (2,)}, "a model of scaled 8-bit numbers"),
        ({"emb_params": (3, 768)}, "a textual-inversion embedding"),
        ({"encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE in a file of its own"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "a diffusers U-Net"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a U-Net alone"),
        ({"text_model.final_layer_norm.bias": (768,)}, "a text encoder alone"),
        ({"cond_stage_model.transformer.attn_layers.layers.0.x": (1,)}, "a BERT text encoder"),
        ({"first_stage_model.quantize.embedding.weight": (1,)}, "a VQ first stage"),
    ],
)
def test_other_families_are_refused_by_name(shapes, kind):
    with pytest.raises(InputError) as caught:
        keys.refuse_other_families(shapes, "some/file.ckpt")
    assert str(caught.value).startswith("some/file.ckpt is ")
    assert kind in str(caught.value)
    assert "Stable Diffusion 1.x and 2.x" in str(caught.value)
