import pytest
import pytorch_lightning as pl
import torch
from golden_util import fill_parameters, load_golden_keys
from torch import nn

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.denoiser import DiffusionWrapper
from ldm.modules.attention import ContextLinear
from ldm.util import instantiate_from_config
from tests.tiny_diffusion import WIDTH, TinyFirstStage, TinyText, TinyUNet, build, target
from tests.tiny_models import tiny_config

STEP = "model.diffusion_model.step.weight"


def test_state_dict_has_upstream_names():
    names = set(build(use_ema=True).state_dict())
    assert {name for name in names if "." not in name} == {
        name for name in load_golden_keys("sd1") if "." not in name
    }
    assert "model.diffusion_model.conv_in.weight" in names
    assert {"model_ema.decay", "model_ema.num_updates"} <= names
    assert "model_ema.diffusion_modelconv_inweight" in names
    assert "first_stage_model.encoder.weight" in names
    assert "cond_stage_model.embedding.weight" in names
    assert not any(name.startswith("model_ema") for name in build(use_ema=False).state_dict())


def test_scale_by_std_stores_the_factor():
    assert "scale_factor" in build(scale_by_std=True, scale_factor=1.0).state_dict()
    assert "scale_factor" not in build().state_dict()


def test_schedule_is_real_on_meta():
    with torch.device("meta"):
        model = build(use_ema=False)
    assert model.model.diffusion_model.conv_in.weight.is_meta
    assert model.device.type == "cpu"
    expected = build(use_ema=False)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(getattr(model, name), buffer, rtol=0, atol=0)


def test_inert_arguments_are_accepted_and_others_refused():
    build(num_timesteps_cond=1, log_every_t=200, finetune_keys=None, clip_denoised=True)
    with pytest.raises(InputError, match="num_timesteps_cond=2"):
        build(num_timesteps_cond=2)
    with pytest.raises(InputError, match="linear_strat"):
        build(linear_strat=0.1)
    with pytest.raises(InputError, match="parameterization 'w': choose from eps, x0, v"):
        build(parameterization="w")
    with pytest.raises(InputError, match="loss_type 'l3'"):
        build(loss_type="l3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear_end": 2.0}, r"betas .* 1\.\d+: must be above 0 and below 1"),
        ({"linear_start": 0.0}, "betas .* 0: must be above 0"),
        ({"linear_start": -1.0}, "betas .* nan: must be above 0"),
        ({"beta_schedule": "sqrt", "linear_start": -1.0}, "betas .* nan: must be above 0"),
        ({"beta_schedule": "cosine", "cosine_s": -1.0}, "betas .* nan: must be above 0"),
        ({"given_betas": [0.1, 1.0, 0.2]}, "betas .* 1: must be above 0"),
        ({"given_betas": []}, "betas .* none: must be above 0"),
        ({"given_betas": [[]]}, r"given_betas of shape \(1, 0\): must be a list of numbers"),
        ({"given_betas": 0.1}, r"given_betas of shape \(\): must be a list of numbers"),
        ({"scale_factor": 0}, "scale_factor 0: must be a number from 1e-06 to 1e"),
        ({"scale_factor": -0.18}, r"scale_factor -0\.18: must be a number"),
        ({"v_posterior": 2}, "v_posterior 2: must be a number from 0 to 1"),
        ({"l_simple_weight": -1.0}, r"l_simple_weight -1\.0: must be a number"),
        ({"original_elbo_weight": -1}, "original_elbo_weight -1: must be a number"),
        ({"timestep_power": -1.0}, r"timestep_power -1\.0: must be a number"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma 0\.0: must be a number"),
    ],
)
def test_numbers_with_which_no_model_is_trained_or_drawn_with_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        build(**arguments)


def test_the_last_of_the_given_betas_may_leave_noise_alone():
    assert build(given_betas=[0.1, 0.2, 1.0], parameterization="v").alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("key", "cond", "seen"),
    [
        (None, {}, {"x": 4, "context": None, "y": False}),
        ("concat", {"c_concat": [5]}, {"x": 9, "context": None, "y": False}),
        ("crossattn", {"c_crossattn": [3, 2]}, {"x": 4, "context": 5, "y": False}),
        ("hybrid", {"c_concat": [5], "c_crossattn": [3]}, {"x": 9, "context": 3, "y": False}),
        ("adm", {"c_crossattn": [3]}, {"x": 4, "context": None, "y": True}),
        ("crossattn-adm", {"c_crossattn": [3], "c_adm": 1}, {"x": 4, "context": 3, "y": True}),
        (
            "hybrid-adm",
            {"c_concat": [5], "c_crossattn": [3], "c_adm": 1},
            {"x": 9, "context": 3, "y": True},
        ),
    ],
)
def test_wrapper_routes_the_conditioning(key, cond, seen):
    in_channels = seen["x"]
    config = {**target(TinyUNet), "params": {"in_channels": in_channels}}
    wrapper = DiffusionWrapper(config, key)
    make = {
        "c_concat": lambda sizes: [torch.zeros(2, n, 4, 4) for n in sizes],
        "c_crossattn": lambda sizes: [torch.zeros(2, n, WIDTH) for n in sizes],
        "c_adm": lambda n: torch.zeros(2, n),
    }
    parts = {name: make[name](sizes) for name, sizes in cond.items()}
    wrapper(torch.zeros(2, 4, 4, 4), torch.zeros(2), **parts)
    got = wrapper.diffusion_model.seen
    assert got["x"].shape[1] == seen["x"]
    assert (None if got["context"] is None else got["context"].shape[1]) == seen["context"]
    assert (got["y"] is not None) == seen["y"]
    for name in parts:
        with pytest.raises(ValueError, match=f"needs {name}"):
            wrapper(torch.zeros(2, 4, 4, 4), torch.zeros(2), **{**parts, name: None})


def test_wrapper_refuses_other_keys():
    with pytest.raises(InputError, match="conditioning_key 'cross'"):
        DiffusionWrapper(target(TinyUNet), "cross")


@pytest.mark.parametrize("label", ["red", ["red"]])
def test_the_caption_that_says_nothing_may_be_in_a_list(label):
    model = build()
    encoded = model.get_unconditional_conditioning(2, label)
    assert torch.equal(encoded, model.get_learned_conditioning(["red", "red"]))


def test_conditioning_key_defaults_as_upstream():
    assert build(conditioning_key=None).model.conditioning_key == "concat"
    assert build(conditioning_key=None, concat_mode=False).model.conditioning_key == "crossattn"
    unconditional = build(cond_stage_config="__is_unconditional__")
    assert unconditional.model.conditioning_key is None
    assert unconditional.cond_stage_model is None
    shared = build(cond_stage_config="__is_first_stage__")
    assert shared.cond_stage_model is shared.first_stage_model


def test_parameterizations_agree():
    model = build()
    x0, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    x = model.q_sample(x0, t, noise)
    v = model.get_v(x0, noise, t)
    torch.testing.assert_close(model.predict_start_from_z_and_v(x, t, v), x0)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(x, t, v), noise)
    torch.testing.assert_close(
        model.predict_start_from_noise(x, t, noise), x0, atol=1e-4, rtol=1e-4
    )


def test_only_what_should_be_trained_is():
    model = build().train()
    assert not model.first_stage_model.training
    assert not model.cond_stage_model.training
    assert model.model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.") for name in trained)
    along = build(cond_stage_trainable=True).train()
    assert along.cond_stage_model.training
    assert along.cond_stage_model.embedding.weight.requires_grad


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "folder"])
def test_weights_are_loaded_from_a_file(tmp_path, suffix):
    source = build()
    nn.init.constant_(source.model.diffusion_model.conv_in.weight, 7.0)
    nn.init.constant_(source.first_stage_model.encoder.weight, 7.0)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "ckpt":
        # as Lightning before 1.5 does, which names its callbacks by their class
        callbacks = {pl.callbacks.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}}
        saved = {"state_dict": source.state_dict(), "global_step": 3, "callbacks": callbacks}
        torch.save(saved, path)
    else:
        from safetensors.torch import save_file

        if suffix == "folder":
            path.mkdir()
        save_file(source.state_dict(), path / "all.safetensors" if path.is_dir() else path)
    model = build(ckpt_path=str(path), ignore_keys=["first_stage_model."])
    assert (model.model.diffusion_model.conv_in.weight == 7).all()
    assert not (model.first_stage_model.encoder.weight == 7).any()
    with pytest.raises(InputError, match=r"there is no checkpoint '.*missing.ckpt'"):
        build(ckpt_path=str(tmp_path / "missing.ckpt"))


def test_averages_that_a_file_lacks_begin_as_its_weights(tmp_path, caplog):
    caplog.set_level("INFO")
    stored = {n: t + 1 for n, t in build(use_ema=True).state_dict().items()}
    counters = {n: t for n, t in stored.items() if not n.startswith("model_ema.diffusion_model")}
    average = "model_ema.diffusion_modelstepweight"
    for kept in (stored, counters, {n: t for n, t in stored.items() if n != average}):
        torch.save(kept, tmp_path / "weights.ckpt")
        model = build(ckpt_path=str(tmp_path / "weights.ckpt"))
        weight = model.model.diffusion_model.step.weight
        assert torch.equal(model.get_buffer(average), weight)
        assert torch.equal(weight, stored[STEP])
        assert (model.model_ema.num_updates > 0) == (kept is stored)
        assert "tensors, 0 missing, 0 without a place" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    "changes", [{"zero_snr": True, "parameterization": "v"}, {"timesteps": 50}, {}]
)
def test_a_file_of_weights_leaves_the_schedule_and_the_decay(tmp_path, changes):
    stored = {name: tensor.half() for name, tensor in build().state_dict().items()}
    torch.save(stored, tmp_path / "weights.ckpt")
    model = build(ckpt_path=str(tmp_path / "weights.ckpt"), **changes)
    assert torch.equal(model.model.diffusion_model.step.weight.half(), stored[STEP])
    assert stored["model_ema.decay"] == 1
    for name, buffer in build(**changes).named_buffers():
        if not name.startswith("model_ema.diffusion_model"):
            assert torch.equal(model.get_buffer(name), buffer), name


def test_weights_under_other_names_are_loaded_and_what_is_lost_is_said(tmp_path, caplog):
    source = build()
    nn.init.constant_(source.model.diffusion_model.conv_in.weight, 7.0)
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": state}, path)
    assert (build(ckpt_path=str(path)).model.diffusion_model.conv_in.weight == 7).all()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    name = "module.first_stage_model.encoder.weight"
    torch.save(
        {
            **{n: t for n, t in state.items() if n != name},
            "v_pred": torch.ones(()),
            "ztsnr": torch.ones(()),
        },
        path,
    )
    build(ckpt_path=str(path))
    assert "which stay as they began: 1, such as first_stage_model.encoder.weight" in caplog.text
    assert "predicts v (by its keys), and is to be trained to predict eps" in caplog.text
    assert "zero terminal SNR, and model.params.zero_snr is not set" in caplog.text
    caplog.clear()
    build(ckpt_path=str(path), parameterization="v", zero_snr=True)
    assert "SNR" not in caplog.text
    torch.save(state | {name: torch.ones(3, dtype=torch.int8)}, path)
    with pytest.raises(InputError, match=r"first_stage_model\.encoder\.weight is int8"):
        build(ckpt_path=str(path))


def test_a_run_reaches_token_merging():
    class Merger:
        n_runs = 0

        def begin_run(self):
            self.n_runs += 1

    model = build()
    model.begin_run()  # a network without token merging
    model.model.diffusion_model.tome = Merger()
    merger = model.model.diffusion_model.tome
    for is_guided in (False, True):
        model.begin_run(is_guided)
        assert merger.is_guided == is_guided
    assert merger.n_runs == 2
    model.end_run()
    assert not merger.is_guided


@pytest.mark.parametrize("n_timesteps", [50, 1000])
def test_progress_of_merging_is_that_of_the_models_own_timesteps(n_timesteps):
    config = tiny_config(timesteps=n_timesteps)["model"]
    steps = [[0, 0.0], [0.7, 0.0], [0.71, 0.5]]
    config["params"]["unet_config"]["params"]["tome_config"] = {"steps": steps}
    model = fill_parameters(instantiate_from_config(config), 0).eval()
    merger = model.model.diffusion_model.tome
    for share, is_merged in ((0.9, False), (0.5, False), (0.1, True)):
        model.begin_run()
        t = torch.tensor([int(share * n_timesteps)])
        model.apply_model(torch.zeros(1, 4, 8, 8), t, torch.zeros(1, 7, 16))
        assert (merger.saved_work() > 0) == is_merged


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_context_is_projected_once_in_a_run(scale, monkeypatch):
    model = instantiate_from_config(tiny_config()["model"])
    fill_parameters(model, 0).eval()
    context, other = torch.randn(2, 2, 7, 16)
    x_T = torch.randn(2, 4, 8, 8)

    def sample():
        return DDIMSampler(model).sample(
            3, 2, (4, 8, 8), context, x_T=x_T, verbose=False,
            unconditional_guidance_scale=scale, unconditional_conditioning=other,
        )[0]  # fmt: skip

    layers = [m for m in model.modules() if isinstance(m, ContextLinear)]
    expected, projected = sample(), []
    plain = nn.Linear.forward
    monkeypatch.setattr(
        ContextLinear, "forward", lambda layer, x: projected.append(layer) or plain(layer, x)
    )
    assert torch.equal(sample(), expected)  # without memory
    assert len(projected) == 3 * len(layers) > 0
    monkeypatch.undo()
    projected.clear()
    monkeypatch.setattr(
        nn.Linear, "forward", lambda layer, x: projected.append(layer) or plain(layer, x)
    )
    assert torch.equal(sample(), expected)
    assert all(projected.count(layer) == 1 for layer in layers)
    assert all(layer._last is None for layer in layers)
    fill_parameters(model, 1)
    assert not torch.equal(sample(), expected)


def test_inpainting_configuration_uses_the_same_class():
    unet = {**target(TinyUNet), "params": {"in_channels": 9}}
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
        "params": {
            "first_stage_config": target(TinyFirstStage),
            "cond_stage_config": target(TinyText),
            "unet_config": unet,
            "conditioning_key": "hybrid",
            "finetune_keys": None,
        },
    }
    model = instantiate_from_config(config)
    cond = {"c_concat": [torch.zeros(2, 5, 4, 4)], "c_crossattn": [torch.zeros(2, 1, WIDTH)]}
    assert model.apply_model(torch.zeros(2, 4, 4, 4), torch.zeros(2), cond).shape == (2, 4, 4, 4)


def test_a_model_may_end_its_schedule_in_noise_alone():
    config = tiny_config(parameterization="v", zero_snr=True)["model"]
    model = instantiate_from_config(config)
    assert model.alphas_cumprod[-1] == 0
    config["params"]["parameterization"] = "eps"
    with pytest.raises(InputError, match="zero_snr needs parameterization v"):
        instantiate_from_config(config)
