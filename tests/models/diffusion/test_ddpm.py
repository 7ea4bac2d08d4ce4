import copy
import math
import sys

import pytest
import pytorch_lightning as pl
import torch
from golden_util import fill_parameters, load_golden_keys
from torch import nn

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion
from ldm.modules.attention import ContextLinear
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config
from tests.tiny_models import quiet_trainer, tiny_config

WIDTH = 8
CAPTIONS = ["red", "green", "blue", "red"]


class TinyUNet(nn.Module):
    """Two convolutions, the step and the mean of the context."""

    def __init__(self, in_channels=4, out_channels=4):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, WIDTH, 3, padding=1)
        self.step = nn.Linear(2, WIDTH)
        self.context = nn.Linear(WIDTH, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, out_channels, 3, padding=1)
        self.seen = {}

    def forward(self, x, timesteps, context=None, y=None):
        self.seen = {"x": x, "context": context, "y": y}
        angle = timesteps.float() / 1000
        h = self.step(torch.stack([angle.cos(), angle.sin()], 1))
        if context is not None:
            h = h + self.context(context.mean(1))
        return self.conv_out(torch.tanh(self.conv_in(x) + h[:, :, None, None]))


class TinyFirstStage(nn.Module):
    """Four channels from each 2 x 2 pixels, at eight times the scale."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 2, stride=2)
        self.decoder = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def encode(self, x):
        return DiagonalGaussianDistribution(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


class TinyText(nn.Module):
    """One vector for each word that the tests use."""

    WORDS = ("", "red", "green", "blue")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(self.WORDS), WIDTH)

    def encode(self, captions):
        return self.embedding(torch.tensor([[self.WORDS.index(c)] for c in captions]))


def target(cls):
    assert sys.modules[__name__]
    return {"target": f"{__name__}.{cls.__name__}"}


def build(**changes):
    arguments = {
        "first_stage_config": target(TinyFirstStage),
        "cond_stage_config": target(TinyText),
        "unet_config": target(TinyUNet),
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "first_stage_key": "image",
        "cond_stage_key": "caption",
        "conditioning_key": "crossattn",
        "scale_factor": 0.5,
    }
    torch.manual_seed(0)
    return LatentDiffusion(**{**arguments, **changes})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(4, 8, 8, 3, generator=generator) * 2 - 1, "caption": CAPTIONS}


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
    model.to_empty(device="cpu")
    model.reset_schedule()
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
    with pytest.raises(InputError, match=r"ucg_training\.caption"):
        build(ucg_training={"caption": {"p": 1.5}})


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


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_a_perfect_network_has_no_loss(parameterization, monkeypatch):
    model = build(parameterization=parameterization)
    z, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    perfect = {"eps": noise, "v": model.get_v(z, noise, t), "x0": z}[parameterization]
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: perfect)
    assert model.p_losses(z, None, t, noise)[0] == 0
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: perfect + 1)
    loss, terms = model.p_losses(z, None, t, noise)
    assert loss == pytest.approx(1, abs=1e-6)
    assert set(terms) == {"loss", "loss_simple", "loss_vlb"}


def test_min_snr_weights_steps_alike_in_terms_of_x0():
    t = torch.tensor([1, 300, 990])
    snr = build().alphas_cumprod[t] / (1 - build().alphas_cumprod[t])
    assert snr[0] > 5 > snr[-1]
    for parameterization, implied in {"eps": snr, "v": snr + 1, "x0": torch.ones(3)}.items():
        weights = build(parameterization=parameterization, min_snr_gamma=5.0)._snr_weight(t)
        torch.testing.assert_close(weights * implied, snr.clamp(max=5))
    torch.testing.assert_close(build()._snr_weight(t), torch.ones(3))


def test_the_steps_of_training_follow_their_power(monkeypatch):
    z = torch.zeros(4000, 4, 1, 1)
    for power in (1.0, 0.5):
        drawn = []
        model = build(timestep_power=power)
        monkeypatch.setattr(model, "p_losses", lambda x, c, t, noise, drawn=drawn: drawn.append(t))
        torch.manual_seed(0)
        model(z, None)
        assert 0 <= drawn[0].min() <= drawn[0].max() <= 999
        assert drawn[0].float().mean() == pytest.approx(1000 / (1 + power), rel=0.03)


def test_logvar_and_bound_enter_the_loss(monkeypatch):
    z, noise = torch.zeros(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    model = build(logvar_init=1.0, original_elbo_weight=2.0, l_simple_weight=3.0, loss_type="l1")
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: noise + 0.5)
    expected = 3 * (0.5 / math.e + 1) + 2 * 0.5 * model.lvlb_weights[t].mean()
    assert model.p_losses(z, None, t, noise)[0] == pytest.approx(expected.item())
    learned = build(learn_logvar=True)
    assert isinstance(learned.logvar, nn.Parameter)
    assert "logvar" in learned.state_dict()


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
    optimized = along.configure_optimizers().param_groups[0]["params"]
    assert any(p is along.cond_stage_model.embedding.weight for p in optimized)


def test_latents_in_the_batch_are_used_as_they_are(batch):
    model = build()
    latent = torch.randn(4, 4, 4, 4)
    z, c = model.get_input({**batch, "latent": latent})
    assert torch.equal(z, latent)
    assert c.shape == (4, 1, WIDTH)
    torch.manual_seed(3)
    z, _ = model.get_input(batch)
    torch.manual_seed(3)
    pictures = batch["image"].permute(0, 3, 1, 2)
    expected = model.encode_first_stage(pictures).sample() * 0.5
    torch.testing.assert_close(z, expected)


def test_text_encoder_gets_a_gradient_only_if_trainable(batch):
    for trainable in (False, True):
        model = build(cond_stage_trainable=trainable)
        _, c = model.get_input(batch)
        assert c.requires_grad == trainable


def test_hybrid_training_is_refused(batch):
    with pytest.raises(InputError, match="'hybrid' cannot be trained"):
        build(conditioning_key="hybrid").get_input(batch)


def test_captions_are_dropped_at_the_given_rate(batch):
    model = build(ucg_training={"caption": {"p": 0.25, "val": None}})
    torch.manual_seed(0)
    n_dropped = sum(model._drop_captions(batch)["caption"].count("") for _ in range(500))
    assert 400 < n_dropped < 600  # of 2000
    assert batch["caption"] == CAPTIONS
    assert build()._drop_captions(batch)["caption"] == CAPTIONS


def fit(model, batch, n_steps, **kwargs):
    loader = torch.utils.data.DataLoader([batch] * n_steps, batch_size=None)
    trainer = quiet_trainer(n_steps, **kwargs)
    trainer.fit(model, loader, loader)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_training_lowers_the_loss_and_moves_the_average(batch, parameterization):
    model = build(
        parameterization=parameterization,
        cond_stage_trainable=True,
        min_snr_gamma=5.0,
        ucg_training={"caption": {"p": 0.1}},
        scheduler_config={
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {
                "warm_up_steps": [5],
                "cycle_lengths": [1000],
                "f_start": [0.1],
                "f_max": [1.0],
                "f_min": [1.0],
            },
        },
    )
    model.learning_rate = 1e-2
    batch = {**batch, "latent": torch.randn(4, 4, 4, 4)}
    first = copy.deepcopy(model)
    trainer = fit(model, batch, 40, limit_val_batches=1, num_sanity_val_steps=0)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/loss_simple", "val/loss", "val/loss_simple_ema"} <= set(logged)
    assert logged["lr_abs"] == pytest.approx(1e-2)
    assert model.model_ema.num_updates == 40

    def loss(m):
        torch.manual_seed(5)
        z, c = m.get_input(batch)
        return m(z.repeat(64, 1, 1, 1), c.repeat(64, 1, 1))[0].item()

    before, after = loss(first), loss(model)
    assert after < 0.8 * before
    live = copy.deepcopy(model.model.state_dict())
    with model.ema_scope():
        assert not torch.equal(model.model.diffusion_model.conv_in.weight, live[next(iter(live))])
        assert loss(model) < before
    assert all(torch.equal(value, live[name]) for name, value in model.model.state_dict().items())
    for name, value in first.first_stage_model.state_dict().items():
        assert torch.equal(value, model.first_stage_model.state_dict()[name])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_scale_by_std_gives_latents_unit_variance(batch):
    model = build(scale_by_std=True, scale_factor=1.0)
    fit(model, batch, 1, limit_val_batches=0)
    assert model.scale_factor != 1
    z, _ = model.get_input(batch)
    assert z.std() == pytest.approx(1, abs=0.2)


def test_log_images_draws_pictures(batch):
    model = build()
    noted = {**batch, "scene": {"place": ["sea"] * 4}}  # whatever else a data set has to say
    pictures = model.log_images(noted, n_pictures=2, ddim_steps=2)
    assert set(pictures) == {"inputs", "reconstruction", "samples", "samples_cfg_scale_5.00"}
    assert all(value.shape == (2, 3, 8, 8) for value in pictures.values())
    assert torch.equal(pictures["inputs"], batch["image"][:2].permute(0, 3, 1, 2))
    latents_only = {"latent": torch.randn(4, 4, 4, 4), "caption": CAPTIONS}
    pictures = model.log_images(latents_only, sample=False)
    assert set(pictures) == {"reconstruction"}


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
