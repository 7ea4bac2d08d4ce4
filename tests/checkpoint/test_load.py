import copy
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.checkpoint import keys
from ldm.checkpoint import load as checkpoint_module
from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.fill import build_without_weights
from ldm.checkpoint.load import default_checkpoint, inspect_checkpoint, load_model
from ldm.config import load_config
from ldm.errors import InputError
from ldm.models.diffusion.schedule import (
    make_beta_schedule,
    rescale_zero_terminal_snr,
    schedule_buffers,
)
from ldm.modules.tome.config import ToMeConfig
from ldm.util import instantiate_from_config
from tests.golden_util import load_golden_keys
from tests.tiny_models import tiny_config, tiny_weights, write_header, write_safetensors

UNET = keys.UNET
IN = f"{UNET}input_blocks.0.0.weight"
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def config2():
    return tiny_config(version=2, parameterization="v")


@pytest.fixture(scope="module")
def weights2(config2):
    return tiny_weights(config2)


def picture(model):
    """What a model makes of fixed noise and a prompt: every component takes part.

    The decoder sees the U-Net's answer, the U-Net the encoded prompt and the encoded picture.
    """
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    with torch.no_grad():
        context = model.get_learned_conditioning(["hills at dawn"])
        z = model.get_first_stage_encoding(model.encode_first_stage(image).mode())
        t = torch.tensor([500])
        cond = {"c_crossattn": [context]}
        if model.model.conditioning_key == "hybrid":
            cond["c_concat"] = [torch.rand(1, 5, 8, 8, generator=generator)]
        return model.decode_first_stage(model.apply_model(z, t, cond))


def same_weights(model, expected):
    found = {n: t for n, t in model.state_dict().items() if n not in keys.SCHEDULE}
    wanted = {n: t for n, t in expected.items() if n not in keys.SCHEDULE}
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# --- loading ----------------------------------------------------------------------------------


def test_loaded_model_is_the_saved_one_and_ready(tmp_path, config, weights):
    model = load_model(write_safetensors(tmp_path / "m.safetensors", weights), config)
    same_weights(model, weights)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.isfinite(picture(model)).all()


def rename(weights, old, new):
    return {name.replace(old, new): tensor for name, tensor in weights.items()}


FILES = {
    "flat": lambda w: w,
    "wrapped": lambda w: {"state_dict": w, "global_step": 470000},
    "doubly wrapped": lambda w: {"state_dict": {"state_dict": w}},
    "lightning": lambda w: {
        "callbacks": {ModelCheckpoint: {"best": torch.tensor(1.0)}},
        "lr_schedulers": [{"base_lr": np.float64(1e-4)}],
        "optimizer_states": [{"state": {0: torch.ones(3)}}],
        "state_dict": w,
    },
    "without text_model": lambda w: {
        "state_dict": rename(w, "transformer.text_model.", "transformer.")
    },
    "sgm prefix": lambda w: rename(w, "cond_stage_model.", "conditioner.embedders.0."),
    "both": lambda w: rename(
        rename(w, "transformer.text_model.", "transformer."),
        "cond_stage_model.",
        "conditioner.embedders.0.",
    ),
    "harmless extras": lambda w: {
        **w,
        f"{TEXT}embeddings.position_ids": torch.full((1, 77), 3.5),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        "logvar": torch.zeros(1000),
        "lvlb_weights": torch.zeros(1000),
        "cond_stage_model.model.attn_mask": torch.zeros(77, 77),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.logit_scale": torch.tensor(1.0),
    },
    "no schedule": lambda w: {n: t for n, t in w.items() if n not in keys.SCHEDULE},
}


@pytest.mark.parametrize("form", FILES)
def test_every_form_of_ckpt(tmp_path, caplog, config, weights, form):
    torch.save(FILES[form](weights), tmp_path / "m.ckpt")
    with caplog.at_level(logging.WARNING, "ldm"):
        model = load_model(tmp_path / "m.ckpt", config)
    same_weights(model, weights)
    assert not caplog.records


def test_sd2_structure(tmp_path, config2, weights2):
    torch.save({"state_dict": weights2}, tmp_path / "m.ckpt")
    model = load_model(tmp_path / "m.ckpt", config2)
    same_weights(model, weights2)
    assert model.parameterization == "v"
    assert torch.isfinite(picture(model)).all()


def test_sd2_from_sgm(tmp_path, config2, weights2):
    renamed = rename(weights2, "cond_stage_model.", "conditioner.embedders.0.")
    same_weights(
        load_model(write_safetensors(tmp_path / "m.safetensors", renamed), config2), weights2
    )


def test_sd2_without_what_its_text_encoder_never_uses(tmp_path, config2, weights2):
    unused = ("resblocks.2.", "text_projection", "logit_scale")
    some = {n: t for n, t in weights2.items() if not any(part in n for part in unused)}
    assert len(weights2) - len(some) == 14
    model = load_model(write_safetensors(tmp_path / "some.safetensors", some), config2)
    full = load_model(write_safetensors(tmp_path / "full.safetensors", weights2), config2)
    assert torch.equal(picture(model), picture(full))


def test_folder(tmp_path, config, weights):
    for prefix in keys.COMPONENTS:
        part = {n: t for n, t in weights.items() if n.startswith(prefix)}
        write_safetensors(tmp_path / f"{prefix.split('.')[0]}.safetensors", part)
    same_weights(load_model(tmp_path, config), weights)


def test_inpainting(tmp_path):
    config = tiny_config(inpainting=True)
    weights = tiny_weights(config)
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    assert inspect_checkpoint(path, config).in_channels == 9
    model = load_model(path, config)
    same_weights(model, weights)
    assert picture(model).shape == (1, 3, 16, 16)


def test_schedule_comes_from_the_configuration(tmp_path, config, weights):
    broken = {n: t * 0 + 7 if n in keys.SCHEDULE else t for n, t in weights.items()}
    model = load_model(write_safetensors(tmp_path / "m.safetensors", broken), config)
    assert model.betas.dtype == torch.float32
    for name in keys.SCHEDULE & set(weights):
        assert torch.equal(getattr(model, name), weights[name]), name


def test_another_schedule_in_the_file_is_named(tmp_path, caplog, config, weights):
    def warnings(stored):
        caplog.clear()
        file = write_safetensors(tmp_path / "m.safetensors", {**weights, "alphas_cumprod": stored})
        load_model(file, config)
        return caplog.text

    own = weights["alphas_cumprod"]
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        assert warnings(own.to(kind)) == ""
    buffers = schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0205))
    assert "another schedule" in warnings(buffers["alphas_cumprod"].double())
    said = warnings(buffers["alphas_cumprod"])
    assert "another schedule than that of the given configuration, which holds" in said
    assert "alphas_cumprod 9.69e-05 at its end, not 0.00466" in said
    assert "(500 steps, not 1000)" in warnings(own[::2].clone())
    ends_in_noise = schedule_buffers(rescale_zero_terminal_snr(weights["betas"].double().numpy()))
    assert "alphas_cumprod 0 at its end" in warnings(ends_in_noise["alphas_cumprod"])


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_and_the_schedule_is_not(tmp_path, config, weights, stored, dtype):
    path = write_safetensors(
        tmp_path / "m.safetensors", {n: t.to(stored) for n, t in weights.items()}
    )
    model = load_model(path, config, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    conv = model.model.diffusion_model.input_blocks[0][0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert model.first_stage_model.encoder.conv_in.weight.is_contiguous()
    assert torch.equal(
        model.model.diffusion_model.out[2].bias, weights[f"{UNET}out.2.bias"].to(stored).to(dtype)
    )
    assert torch.equal(model.alphas_cumprod, weights["alphas_cumprod"])


def test_learned_scale_is_kept(tmp_path, config, weights):
    config = copy.deepcopy(config)
    config["model"]["params"] |= {"scale_by_std": True, "scale_factor": 1.0}
    learned = {**weights, "scale_factor": torch.tensor(0.7391)}
    path = write_safetensors(tmp_path / "m.safetensors", learned)
    model = load_model(path, config, dtype=torch.bfloat16)
    assert model.scale_factor == torch.tensor(0.7391)


def test_ema(tmp_path, config, weights):
    averages = {keys.ema_name(n): t + 1 for n, t in weights.items() if n.startswith(UNET)}
    path = write_safetensors(tmp_path / "m.safetensors", {**weights, **averages})
    assert inspect_checkpoint(path, config).has_ema
    same_weights(load_model(path, config), weights)
    averaged = {n: t + 1 if n.startswith(UNET) else t for n, t in weights.items()}
    same_weights(load_model(path, config, ema=True), averaged)


def test_ema_of_our_own_training_is_found(tmp_path, config):
    """A model that was built with an EMA copy, saved as Lightning does it."""
    trained = copy.deepcopy(config)
    trained["model"]["params"]["use_ema"] = True
    weights = tiny_weights(trained)
    for name in weights:
        if name.startswith("model_ema.diffusion_model"):
            weights[name] = weights[name] + 0.5
    torch.save({"state_dict": weights}, tmp_path / "m.ckpt")
    model = load_model(tmp_path / "m.ckpt", trained, ema=True)
    for name, tensor in model.state_dict().items():
        if name.startswith(UNET):
            assert torch.equal(tensor, weights[keys.ema_name(name)])
    assert not any(name.startswith("model_ema") for name in model.state_dict())


def test_ema_missing(tmp_path, config, weights):
    counters = {**weights, "model_ema.num_updates": torch.tensor(3)}
    path = write_safetensors(tmp_path / "m.safetensors", counters)
    with pytest.raises(InputError, match="has no EMA weights"):
        inspect_checkpoint(path, config, ema=True)


def test_ema_incomplete(tmp_path, config, weights):
    averages = {keys.ema_name(n): t.clone() for n, t in weights.items() if n.startswith(UNET)}
    del averages[keys.ema_name(f"{UNET}out.2.bias")]
    path = write_safetensors(tmp_path / "m.safetensors", {**weights, **averages})
    with pytest.raises(InputError, match=r"lacks 1 tensor .*out\.2\.bias"):
        load_model(path, config, ema=True)


def test_loading_draws_no_random_number(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    before = torch.get_rng_state()
    load_model(path, config)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_goes_back_to_normal_even_after_failure(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    bad = copy.deepcopy(config)
    bad["model"]["params"]["unet_config"]["params"]["nonsense"] = 1
    with pytest.raises(InputError, match="nonsense"):
        load_model(path, bad)
    assert not torch.nn.Linear(1, 1).weight.is_meta


def test_attention_and_token_merging(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    plain = picture(load_model(path, config))
    einsum = load_model(path, config, attention="einsum")
    assert torch.allclose(picture(einsum), plain, atol=1e-4)
    from ldm.modules.attention import CrossAttention

    backends = {m.backend for m in einsum.modules() if isinstance(m, CrossAttention)}
    assert backends == {"einsum"}
    merged = picture(load_model(path, config, tome={"method": "bipartite", "ratio": 0.4}))
    assert not torch.allclose(merged, plain, atol=1e-4)
    settings = ToMeConfig.from_mapping({"method": "bipartite", "ratio": 0.4})
    assert torch.equal(picture(load_model(path, config, tome=settings)), merged)
    in_yaml = copy.deepcopy(config)
    in_yaml["model"]["params"]["unet_config"]["params"]["tome_config"] = {
        "ratio": 0.4,
        "method": "bipartite",
    }
    assert torch.equal(picture(load_model(path, in_yaml)), merged)
    off = load_model(path, in_yaml, tome=ToMeConfig.from_mapping(None))
    assert torch.equal(picture(off), plain)


# --- every tensor counts ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("prefix", keys.COMPONENTS)
def test_changing_any_one_tensor_changes_the_picture(version, prefix):
    """Each tensor in turn: loaded where it does something, and nowhere else."""
    config = tiny_config(version=version)
    model = instantiate_from_config(config["model"])
    from tests.golden_util import fill_parameters

    fill_parameters(model, 0)
    model.eval()
    reference = picture(model)
    idle = keys.idle_text_names(model.state_dict(), config["model"]["params"]["cond_stage_config"])
    checked = 0
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            # a constant added to every key, or to every channel of a group, can cancel out
            change = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
            parameter.add_(change)
        is_changed = not torch.equal(picture(model), reference)
        assert is_changed == (name not in idle), name
        with torch.no_grad():
            parameter.copy_(kept)
        checked += 1
    assert checked > 20


# --- files that do not fill the model ---------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        (keys.UNET, "U-Net"),
        (keys.FIRST_STAGE, "first stage"),
        (keys.TEXT_ENCODER, "text encoder"),
    ],
)
def test_missing_component_is_named(tmp_path, config, weights, prefix, what):
    rest = {n: t for n, t in weights.items() if not n.startswith(prefix)}
    path = write_safetensors(tmp_path / "m.safetensors", rest)
    with pytest.raises(InputError, match=f"has no {what}"):
        inspect_checkpoint(path, config)


def test_missing_tensors_are_counted_and_named(tmp_path, config, weights):
    rest = {n: t for n, t in weights.items() if ".attn2." not in n}
    path = write_safetensors(tmp_path / "m.safetensors", rest)
    with pytest.raises(InputError, match=r"lacks \d\d tensors .*attn2.*, \.\.\.\)"):
        load_model(path, config)


def test_other_shapes(tmp_path, config, weights):
    other = {**weights, f"{UNET}time_embed.0.bias": torch.zeros(5)}
    path = write_safetensors(tmp_path / "m.safetensors", other)
    with pytest.raises(
        InputError, match=r"1 tensor \(.*time_embed\.0\.bias\); the first is \(5,\), not \(128,\)"
    ):
        load_model(path, config)


def test_unknown_tensors_of_the_unet_are_fatal(tmp_path, config, weights):
    other = {**weights, f"{UNET}adapter.weight": torch.zeros(5)}
    path = write_safetensors(tmp_path / "m.safetensors", other)
    with pytest.raises(InputError, match=r"1 tensor .*adapter.* without a place"):
        load_model(path, config)


def test_unknown_tensors_elsewhere_are_reported(tmp_path, caplog, config, weights):
    other = {**weights, "cond_stage_model.transformer.vision_model.x": torch.zeros(5)}
    path = write_safetensors(tmp_path / "m.safetensors", other)
    same_weights(load_model(path, config), weights)
    assert "1 tensor (cond_stage_model.transformer.vision_model.x) without a place" in caplog.text


def test_nothing_of_stable_diffusion(tmp_path, config):
    path = write_safetensors(tmp_path / "m.safetensors", {"layer.weight": torch.zeros(5)})
    with pytest.raises(InputError, match="is no Stable Diffusion checkpoint"):
        load_model(path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet_config": {"target": "ldm.nowhere.UNet", "params": {}}}, "no 'in_channels'"),
        ({"timesteps": "many"}, "no model can be built|timesteps"),
        ({"colour": "red"}, "colour"),
        ({"first_stage_config": {"params": {}}}, "no latent-diffusion model"),
    ],
)
def test_configurations_from_which_nothing_can_be_built(tmp_path, config, weights, change, message):
    bad = copy.deepcopy(config)
    bad["model"]["params"] |= change
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path, bad)
    assert "\n" not in str(caught.value)


# --- what a file is ---------------------------------------------------------------------------


def full_size(path, family, **metadata):
    """A file with all names and shapes of a published model that takes no room."""
    shapes = load_golden_keys(family.removesuffix("-inpainting"))
    if family.endswith("-inpainting"):
        shapes[IN] = (320, 9, 3, 3)
    return write_header(path, shapes, **metadata)


@pytest.mark.parametrize(
    ("stem", "family", "metadata", "config_name", "prediction", "source"),
    [
        ("sd-v1-4", "sd1", {}, "v1-inference", "eps", "configuration"),
        ("sd-v1-5-768", "sd1", {}, "v1-inference", "eps", "configuration"),
        ("any", "sd1", {"prediction_type": "v"}, "v1-inference", "v", "metadata"),
        ("any", "sd1-inpainting", {}, "v1-inpainting-inference", "eps", "configuration"),
        ("512-base-ema", "sd2", {}, "v2-inference", "eps", "name"),
        ("v2-1_768-ema-pruned", "sd2", {}, "v2-inference-v", "v", "name"),
        ("512", "sd2", {"modelspec.prediction_type": "v"}, "v2-inference-v", "v", "metadata"),
        ("any", "sd2-inpainting", {}, "v2-inpainting-inference", "eps", "configuration"),
    ],
)
def test_published_families(tmp_path, stem, family, metadata, config_name, prediction, source):
    path = full_size(tmp_path / f"{stem}.safetensors", family, **metadata)
    info = inspect_checkpoint(path)
    assert info.family == family
    assert Path(info.config_name).stem == config_name
    assert info.prediction == info.config["model"]["params"]["parameterization"] == prediction
    assert source in info.prediction_source
    assert info.in_channels == (9 if "inpainting" in family else 4)
    assert info.n_tensors == (1143 if family.startswith("sd1") else 1240)
    assert not info.has_ema
    assert info.defaults["H"] == (768 if config_name == "v2-inference-v" else 512)
    assert prediction in info.summary()
    assert "\n" not in info.summary()


def test_sd2_of_unknown_kind_asks(tmp_path):
    path = full_size(tmp_path / "mine.safetensors", "sd2")
    with pytest.raises(InputError, match="give --parameterization eps or v"):
        inspect_checkpoint(path)
    for choice, name in (("eps", "v2-inference"), ("v", "v2-inference-v")):
        info = inspect_checkpoint(path, parameterization=choice)
        assert (info.prediction, Path(info.config_name).stem) == (choice, name)


def test_parameterization_beats_all_else(tmp_path):
    path = full_size(tmp_path / "768-v.safetensors", "sd2", prediction_type="v")
    assert inspect_checkpoint(path, parameterization="eps").prediction == "eps"


def test_unknown_parameterization(tmp_path):
    path = full_size(tmp_path / "m.safetensors", "sd1")
    with pytest.raises(InputError, match="parameterization 'x' is none of eps, x0, v"):
        inspect_checkpoint(path, parameterization="x")


@pytest.mark.parametrize("name", ["v2-inference", "v2-inference-v"])
def test_sidecar_decides(tmp_path, name):
    shipped = load_config(f"configs/stable-diffusion/{name}.yaml")
    del shipped["defaults"]  # as upstream's file is
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(shipped))
    info = inspect_checkpoint(full_size(tmp_path / "mine.safetensors", "sd2"))
    assert info.config_name == str(tmp_path / "mine.yaml")
    assert info.prediction == ("v" if name.endswith("-v") else "eps")
    assert info.defaults["H"] == (768 if name.endswith("-v") else 512)


def test_a_yaml_of_something_else_beside_a_file_is_named_with_a_way_out(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {params: {batch_size: 1}}")
    path = full_size(tmp_path / "mine.safetensors", "sd2")
    with pytest.raises(
        InputError, match=r"mine.yaml has no section model.* mine.safetensors, .*re"
    ):
        inspect_checkpoint(path)


def test_given_configuration_comes_before_the_sidecar(tmp_path):
    (tmp_path / "mine.yaml").write_text("nonsense: true")
    path = full_size(tmp_path / "mine.safetensors", "sd2")
    info = inspect_checkpoint(path, "configs/stable-diffusion/v2-inference-v.yaml")
    assert info.prediction == "v"


@pytest.mark.parametrize(
    ("family", "given", "advice"),
    [
        ("sd1", "v2-inference", "1024 for context_dim, the file 768; .*v1-inference.yaml fits"),
        ("sd1", "v1-inpainting-inference", "in_channels.*v1-inference.yaml fits"),
        ("sd2", "v1-inference", r"v2-inference-v.yaml or .*v2-inference.yaml fits"),
        ("sd2-inpainting", "v2-inference", "in_channels.*v2-inpainting-inference.yaml fits"),
    ],
)
def test_wrong_configuration_is_refused_with_the_right_one(tmp_path, family, given, advice):
    path = full_size(tmp_path / "512.safetensors", family)
    with pytest.raises(InputError, match=f"does not fit.*{advice}") as caught:
        inspect_checkpoint(path, f"configs/stable-diffusion/{given}.yaml")
    assert "\n" not in str(caught.value)


def test_metadata_against_the_given_configuration(tmp_path):
    path = full_size(tmp_path / "m.safetensors", "sd2", prediction_type="v")
    eps = "configs/stable-diffusion/v2-inference.yaml"
    with pytest.raises(
        InputError, match=r"says eps-prediction, but the metadata .* v: give --param"
    ):
        inspect_checkpoint(path, eps)
    assert inspect_checkpoint(path, eps, parameterization="v").prediction == "v"


def test_model_of_another_size_needs_a_configuration(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    with pytest.raises(
        InputError, match=r"no shipped configuration fits .* context size 16.*--config"
    ):
        inspect_checkpoint(path)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    info = inspect_checkpoint(path)
    assert info.family == "custom"
    assert (info.defaults["H"], info.defaults["f"], info.defaults["steps"]) == (16, 2, 2)


def test_training_run_keeps_the_configuration(tmp_path, config, weights):
    for folder in ("checkpoints", "configs"):
        (tmp_path / folder).mkdir()
    old, new = (tmp_path / f"configs/2026-01-0{day}T00-00-00-project.yaml" for day in (1, 2))
    old.write_text("nonsense: true")
    new.write_text(yaml.safe_dump(config))
    torch.save({"state_dict": weights}, tmp_path / "checkpoints" / "last.ckpt")
    info = inspect_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert info.config_name == str(new)
    # what it says of its data may have been true on another machine
    new.write_text(yaml.safe_dump({**config, "data": {"params": {"folder": "${oc.env:DATA}"}}}))
    for given in (None, new):
        assert inspect_checkpoint(tmp_path / "checkpoints" / "last.ckpt", given).family == "custom"


def test_other_families_are_refused(tmp_path):
    path = write_header(
        tmp_path / "xl.safetensors",
        {IN: (320, 4, 3, 3), "conditioner.embedders.1.model.ln_final.bias": (1280,)},
    )
    with pytest.raises(InputError, match=r"xl.safetensors is an SDXL model"):
        load_model(path)


def test_given_configuration_is_not_changed(tmp_path, config, weights):
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    before = copy.deepcopy(config)
    load_model(path, config, parameterization="v", ema=False)
    assert config == before


def test_looking_at_a_file_takes_neither_lightning_nor_the_text_libraries(tmp_path):
    path = full_size(tmp_path / "m.safetensors", "sd1")
    code = f"""
import sys
from ldm.checkpoint.load import inspect_checkpoint
inspect_checkpoint({str(path)!r})
print([name for name in ("pytorch_lightning", "transformers", "open_clip") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- the default ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty working folder, and a project folder beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(checkpoint_module, "shipped", lambda path: tmp_path / "project" / path)
    return tmp_path / "project"


def touch(path):
    path.parent.mkdir(parents=True)
    path.touch()


def test_default_is_upstreams_path(project):
    touch(project / "models/ldm/stable-diffusion-v1/model.ckpt")
    path, note = default_checkpoint()
    assert path == project / "models/ldm/stable-diffusion-v1/model.ckpt"
    assert note is None
    touch(Path("models/ldm/stable-diffusion-v1/model.ckpt"))
    assert default_checkpoint()[0] == Path("models/ldm/stable-diffusion-v1/model.ckpt")


def test_default_is_else_the_demo_and_says_so(project):
    touch(project / "models/demo/unet.safetensors")
    path, note = default_checkpoint()
    assert path == project / "models/demo"
    assert "demo" in note
    assert "--ckpt" in note
    assert "\n" not in note


@pytest.mark.usefixtures("project")
def test_no_default():
    with pytest.raises(InputError, match="give one with --ckpt"):
        default_checkpoint()


# --- full size --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd1-inpainting", "sd2-inpainting"])
def test_every_published_tensor_has_its_place(tmp_path, family):
    """Names and shapes of the built model are exactly those of the published file."""
    path = full_size(tmp_path / "512.safetensors", family)
    info = inspect_checkpoint(path)
    model = build_without_weights(info.config, info.config_name, info.n_tensors)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: entry.shape for name, entry in open_state_dict(path).entries.items()}
    wanted.pop(f"{TEXT}embeddings.position_ids", None)
    assert found == wanted
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


SCRIPT = """
import sys
import torch
from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.load import load_model
from ldm.checkpoint.keys import SCHEDULE

def megabytes(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) / 1024

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
import ldm.models.diffusion.ddpm, transformers, open_clip
before = megabytes("RssAnon")
model = load_model(path, dtype=dtype)
anonymous = megabytes("RssAnon") - before
peak = megabytes("VmHWM") - before
stored = open_state_dict(path)
wrong = [
    name for name, tensor in model.state_dict().items()
    if name not in SCHEDULE and not torch.equal(tensor, stored[name].to(dtype))
]
print(len(model.state_dict()), len(wrong), round(anonymous), round(peak))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
@pytest.mark.parametrize(("family", "count"), [("sd1", 1142), ("sd2", 1240)])
def test_full_size(tmp_path, family, count, kind):
    """Random numbers in every tensor of a file of the published size arrive in their places."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20, generator=generator).half()
    weights = {}
    for number, (name, shape) in enumerate(load_golden_keys(family).items()):
        size = torch.Size(shape).numel()
        # a different stretch of numbers for each name
        weights[name] = noise.roll(number).repeat(size // len(noise) + 1)[:size].reshape(shape)
    path = tmp_path / f"768-v.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": weights, "callbacks": {ModelCheckpoint: {}}}, path)
    else:
        write_safetensors(path, weights)
    size = sum(t.numel() for t in weights.values()) * 2 / 2**20  # MiB in half precision
    del weights
    for dtype, own in (("float16", size), ("float32", 2 * size)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, path, dtype], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        n_tensors, n_wrong, anonymous, peak = map(int, done.stdout.split())
        assert (n_tensors, n_wrong) == (count, 0)
        # the model once, and at most the file's pages, which the system can drop, besides
        assert anonymous < own + 300
        assert peak < own + size + 900
    path.unlink()
