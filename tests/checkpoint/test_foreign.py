"""Files as other programs write them, which need a rename, a reshape, a slice or a neighbour."""

import copy
import logging
import re

import pytest
import torch
import yaml

from ldm.checkpoint.load import inspect_checkpoint, load_model
from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from tests.tiny_models import FIRST_STAGE, write_safetensors

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TOKENS = f"{TEXT}transformer.text_model.embeddings.token_embedding.weight"


def is_same(model, weights):
    found = model.state_dict()
    names = [n for n in weights if n.startswith((UNET, VAE, TEXT))]
    return all(torch.equal(found[n], weights[n]) for n in names)


def renamed(weights, *pairs):
    result = {}
    for name, tensor in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def in_vae_attention(weights, names):
    pairs = [(f".mid.attn_1.{old}.", f".mid.attn_1.{new}.") for old, new in names.items()]
    return renamed(weights, *pairs)


def reshaped(weights, choose, change):
    return {n: change(t) if choose(n, t) else t for n, t in weights.items()}


FORMS = {
    "module.": lambda w: {f"module.{n}": t for n, t in w.items()},
    "_orig_mod.": lambda w: {f"_orig_mod.{n}": t for n, t in w.items()},
    "a compiled U-Net": lambda w: renamed(w, (UNET, f"{UNET}_orig_mod.")),
    "both": lambda w: renamed(w, (UNET, f"{UNET}module._orig_mod."), (VAE, f"{VAE}module.")),
    "to_q": lambda w: in_vae_attention(
        w, {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    ),
    "query": lambda w: in_vae_attention(
        w, {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}
    ),
    "matrices": lambda w: reshaped(
        w, lambda n, t: ".attn_1." in n and t.ndim == 4, lambda t: t[:, :, 0, 0]
    ),
    "biases (n, 1, 1)": lambda w: reshaped(
        w, lambda n, t: n.startswith((UNET, VAE)) and t.ndim == 1, lambda t: t[:, None, None]
    ),
    "a token more": lambda w: reshaped(
        w, lambda n, t: n == TOKENS, lambda t: torch.cat([t, t[:1]])
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_rename_a_reshape_or_a_slice_is_enough(tmp_path, caplog, config, weights, form):
    path = write_safetensors(tmp_path / "m.safetensors", FORMS[form](weights))
    with caplog.at_level(logging.WARNING, "ldm"):
        assert is_same(load_model(path, config), weights)
    assert not caplog.records


def test_tokens_that_no_word_of_a_prompt_becomes_are_said(tmp_path, caplog, config, weights):
    more = weights | {TOKENS: torch.cat([weights[TOKENS], weights[TOKENS][:2]])}
    with caplog.at_level(logging.INFO, "ldm"):
        load_model(write_safetensors(tmp_path / "m.safetensors", weights), config)
        assert "tokens of its own training's" not in caplog.text
        load_model(write_safetensors(tmp_path / "more.safetensors", more), config)
    assert "more.safetensors has 2 tokens of its own training's" in caplog.text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{UNET}out.2.bias", lambda t: t[:, None].expand(-1, 2)),
        (TOKENS, lambda t: t[:-1]),
        (TOKENS, lambda t: t.T),
        (f"{UNET}out.2.weight", lambda t: t.transpose(0, 1)),
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", lambda t: t.T),
    ],
)
def test_what_needs_more_is_refused(tmp_path, config, weights, name, change):
    path = write_safetensors(tmp_path / "m.safetensors", weights | {name: change(weights[name])})
    with pytest.raises(InputError, match="does not fit"):
        load_model(path, config)


# --- the VAE ----------------------------------------------------------------------------------


def test_a_decoder_alone_draws_and_encodes_nothing(tmp_path, config, weights):
    rest = {n: t for n, t in weights.items() if not n.startswith((f"{VAE}enc", f"{VAE}quant"))}
    path = write_safetensors(tmp_path / "m.safetensors", rest)
    assert not inspect_checkpoint(path, config).can_encode
    model = load_model(path, config)
    whole = load_model(write_safetensors(tmp_path / "whole.safetensors", weights), config)
    z = torch.ones(1, 4, 8, 8)
    assert torch.equal(model.decode_first_stage(z), whole.decode_first_stage(z))
    with pytest.raises(InputError, match="draws from prompts alone"):
        model.encode_first_stage(torch.zeros(1, 3, 16, 16))


DIFFUSERS = [
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0."),
    ("encoder.down.1.block.0.", "encoder.down_blocks.1.resnets.0."),
    ("encoder.down.0.downsample.", "encoder.down_blocks.0.downsamplers.0."),
    *((f"decoder.up.1.block.{i}.", f"decoder.up_blocks.0.resnets.{i}.") for i in (0, 1)),
    *((f"decoder.up.0.block.{i}.", f"decoder.up_blocks.1.resnets.{i}.") for i in (0, 1)),
    ("decoder.up.1.upsample.", "decoder.up_blocks.0.upsamplers.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
]
VAE_FORMS = {
    "plain": lambda w: {n.removeprefix(VAE): t for n, t in w.items()},
    "with its loss": lambda w: {
        **{n.removeprefix(VAE): t for n, t in w.items()},
        "loss.logvar": torch.zeros(()),
    },
    "a whole checkpoint": lambda w: w | {f"{UNET}out.2.bias": torch.zeros(4)},
    "diffusers": lambda w: renamed({n.removeprefix(VAE): t for n, t in w.items()}, *DIFFUSERS),
}


@pytest.mark.parametrize("form", VAE_FORMS)
@pytest.mark.parametrize("beside", [True, False])
def test_a_vae_of_its_own_takes_the_place(tmp_path, config, weights, form, beside):
    """Given, or beside the model; with a VAE in the model, or without."""
    other = {n: t + 1 for n, t in weights.items() if n.startswith(VAE)}
    name = "m.vae.safetensors" if beside else "other.safetensors"
    vae = write_safetensors(tmp_path / name, VAE_FORMS[form](other))
    for has_own in (True, False):
        rest = {n: t for n, t in weights.items() if has_own or not n.startswith(VAE)}
        path = write_safetensors(tmp_path / "m.safetensors", rest)
        given = None if beside else vae
        info = inspect_checkpoint(path, config, vae=given)
        assert info.vae == vae
        assert str(vae) in info.summary()
        assert is_same(load_model(path, config, vae=given), weights | other)


@pytest.mark.parametrize("form", VAE_FORMS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_first_stage_in_training_begins_with_any_of_them(tmp_path, caplog, weights, form, prefix):
    own = {n: t for n, t in weights.items() if n.startswith(VAE)}
    stored = {prefix + name: tensor for name, tensor in VAE_FORMS[form](own).items()}
    path = write_safetensors(tmp_path / "vae.safetensors", stored)
    model = AutoencoderKL(**FIRST_STAGE["params"], ckpt_path=str(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[VAE + name]), name
    assert not caplog.records


def test_the_vae_of_a_link_is_that_of_its_file(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    vae = write_safetensors(tmp_path / "m.vae.safetensors", weights)
    (tmp_path / "model.safetensors").symlink_to(path)
    assert inspect_checkpoint(tmp_path / "model.safetensors", config).vae == vae


def test_without_a_vae_the_way_out_is_named(tmp_path, config, weights):
    rest = {n: t for n, t in weights.items() if not n.startswith(VAE)}
    path = write_safetensors(tmp_path / "m.safetensors", rest)
    with pytest.raises(InputError, match=r"has no first stage .*give one with --vae"):
        inspect_checkpoint(path, config)
    with pytest.raises(InputError, match=r"m.safetensors is no VAE"):
        inspect_checkpoint(path, config, vae=path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w | {f"{VAE}quant_conv.bias": torch.zeros(3)}, "does not fit .*other shapes"),
        (lambda w: {n: t for n, t in w.items() if "decoder.conv_out" not in n}, "lacks 2"),
    ],
)
def test_a_fault_of_the_vae_names_its_file(tmp_path, config, weights, change, said):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    own = {n: t for n, t in weights.items() if n.startswith(VAE)}
    vae = write_safetensors(tmp_path / "other.safetensors", change(own))
    with pytest.raises(InputError, match=f"other.safetensors {said}"):
        load_model(path, config, vae=vae)


def test_the_vae_of_an_sdxl_checkpoint_is_refused(tmp_path, config, weights):
    """It fits, and draws wrong pictures: its latents have another scale."""
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    key = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    own = {n: t for n, t in weights.items() if n.startswith(VAE)}
    other = write_safetensors(tmp_path / "xl.safetensors", own | {key: torch.zeros(1, 2048)})
    with pytest.raises(InputError, match=r"xl.safetensors is an SDXL model, .* another scale"):
        inspect_checkpoint(path, config, vae=other)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{}", None),
        ('{"scaling_factor": 0.18215}', None),
        ('{"scaling_factor": 0.13025}', r"latents of the scale 0.13025 .* model's have 0.18215"),
        ('{"scaling_factor": "x"}', "scaling_factor: must be a number, not 'x'"),
    ],
)
def test_the_scale_that_a_vaes_configuration_says(tmp_path, config, weights, said, message):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(said)
    own = {n: t for n, t in weights.items() if n.startswith(VAE)}
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "other"):
        vae = write_safetensors(folder / f"{name}.safetensors", VAE_FORMS["diffusers"](own))
        if message is None or name == "other":  # which the configuration is not about
            assert inspect_checkpoint(path, config, vae=vae).vae == vae
        else:
            with pytest.raises(InputError, match=message):
                inspect_checkpoint(path, config, vae=vae)


@pytest.mark.parametrize(
    ("name", "is_xl"),
    [
        *(("sdxl_vae", True), ("sdxl.vae", True), ("xlVAE_v1", True), ("fixFP16-XL-VAE", True)),
        *(("vae-ft-mse-840000", False), ("pixlvae", False), ("xlarge", False), ("photonXL", False)),
    ],
)
def test_a_vae_for_sdxl_by_its_name_is_a_warning(tmp_path, caplog, config, weights, name, is_xl):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    own = {n: t for n, t in weights.items() if n.startswith(VAE)}
    inspect_checkpoint(path, config, vae=write_safetensors(tmp_path / f"{name}.safetensors", own))
    assert ("by its name a VAE for SDXL" in caplog.text) == is_xl


# --- a configuration beside the file ----------------------------------------------------------


def beside(folder, config, weights, change, name="m.yaml"):
    whole = copy.deepcopy(config)
    change(whole["model"], whole["model"]["params"])
    (folder / name).write_text(yaml.safe_dump(whole))
    return write_safetensors(folder / "m.safetensors", weights)


def set_targets(model, params, path):
    model["target"] = path
    for section in ("unet_config", "first_stage_config", "cond_stage_config"):
        params[section]["target"] = path
    params["first_stage_config"]["params"]["lossconfig"]["target"] = path
    params["scheduler_config"] = {"target": path}
    params["personalization_config"] = {"target": path, "params": {"args": ["x"]}}


@pytest.mark.parametrize("path", ["os.system", "subprocess.getoutput", "torch.hub.load", "x"])
def test_a_file_beside_gives_values_and_no_targets(tmp_path, caplog, config, weights, path):
    path = beside(tmp_path, config, weights, lambda m, p: set_targets(m, p, path))
    assert is_same(load_model(path), weights)
    for section in ("model", "unet_config", "first_stage_config", "cond_stage_config"):
        assert f"{section}.target" in caplog.text


@pytest.mark.parametrize(
    "keys",
    [
        {"embedding_reg_weight": 0.0, "unfreeze_model": False, "model_lr": 0.0},
        {"personalization_config": {"target": "x.y", "params": {}}},
        {"freeze_model": "crossattn-kv", "a_key_of_some_fork": [1]},
    ],
)
def test_keys_of_training_do_not_matter_for_drawing(tmp_path, caplog, config, weights, keys):
    path = beside(tmp_path, config, weights, lambda m, p: p.update(keys))
    assert is_same(load_model(path), weights)
    for key in keys:
        assert key in caplog.text


def test_nor_do_they_in_a_configuration_that_is_given(tmp_path, caplog, config, weights):
    path = beside(
        tmp_path, config, weights, lambda m, p: p.update(embedding_reg_weight=1.0), "run.yaml"
    )
    assert is_same(load_model(path, tmp_path / "run.yaml"), weights)
    assert "left out: embedding_reg_weight" in caplog.text


@pytest.mark.parametrize("name", ["m.yaml", "run.yaml"])
def test_what_stands_where_nothing_reads_it_is_named(tmp_path, caplog, config, weights, name):
    def change(model, params):
        model["steps"] = 3
        params["unet_config"]["use_fp16"] = True

    path = beside(tmp_path, config, weights, change, name)
    with (tmp_path / name).open("a") as file:
        file.write("\ndefault: {steps: 3}\n")
    load_model(path, tmp_path / name if name == "run.yaml" else None)
    for key in ("default", "model.steps", "model.params.unet_config.use_fp16"):
        assert re.search(rf"left out: .*\b{key}\b", caplog.text)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, p: p["unet_config"]["params"].update(num_res_blocks=10**6),
        lambda m, p: p["unet_config"]["params"].update(transformer_depth=10**6),
        lambda m, p: p["first_stage_config"]["params"]["ddconfig"].update(num_res_blocks=10**6),
        lambda m, p: p["first_stage_config"]["params"]["ddconfig"].update(ch=10**9),
        lambda m, p: p["cond_stage_config"]["params"]["text_config"].update(
            num_hidden_layers=10**6
        ),
        lambda m, p: p.update(timesteps=10**9),
        lambda m, p: p.update(timesteps="${oc.env:HOME}"),
        lambda m, p: p.update(unet_config="x"),
        lambda m, p: p.update(scale_factor=0),
        lambda m, p: p.update(scale_factor="x"),
        lambda m, p: p.update(linear_end=-1.0),
        lambda m, p: p.update(linear_end=7),
        lambda m, p: p.update(channels=5),
        lambda m, p: p.update(conditioning_key="hybrid"),
        lambda m, p: p["cond_stage_config"]["params"].update(max_length=10**9),
        lambda m, p: p["unet_config"].update(params=[1]),
        lambda m, p: p["unet_config"]["params"].update(context_dim=[]),
        lambda m, p: p["unet_config"]["params"].update(num_heads=0),
        lambda m, p: m.update(params=None),
    ],
)
def test_values_that_describe_no_such_model_are_one_line(tmp_path, config, weights, change):
    path = beside(tmp_path, config, weights, change)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["unet_config", "first_stage_config", "cond_stage_config"])
def test_what_stands_in_the_place_of_a_part_is_named(tmp_path, config, weights, key):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    config = copy.deepcopy(config)
    config["model"]["params"][key]["target"] = "torch.nn.Identity"
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"{key}: Identity is no"):
        load_model(path, other)
