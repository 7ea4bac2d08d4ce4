"""Loss, steps and logged pictures of a diffusion model in training."""

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.errors import InputError
from ldm.training.callbacks import RisenLoss
from ldm.training.clock import Clock
from ldm.training.diffusion import DiffusionTraining
from tests.tiny_diffusion import CAPTIONS, WIDTH
from tests.tiny_diffusion import build as build_model
from tests.tiny_models import quiet_trainer


def build(**changes):
    return DiffusionTraining(build_model(**changes))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(4, 8, 8, 3, generator=generator) * 2 - 1, "caption": CAPTIONS}


def test_a_checkpoint_to_go_on_from_leaves_the_schedule():
    plain, changed = build(parameterization="v"), build(parameterization="v", zero_snr=True)
    nn.init.constant_(plain.net.model.diffusion_model.conv_in.weight, 7.0)
    changed.load_state_dict(plain.state_dict())
    assert (changed.net.model.diffusion_model.conv_in.weight == 7).all()
    assert changed.net.sqrt_alphas_cumprod[-1] == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        changed.load_state_dict({n: t for n, t in plain.state_dict().items() if n != "betas"})


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_a_perfect_network_has_no_loss(parameterization, monkeypatch):
    model = build(parameterization=parameterization)
    z, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    perfect = {"eps": noise, "v": model.net.get_v(z, noise, t), "x0": z}[parameterization]
    monkeypatch.setattr(model.net, "apply_model", lambda x, t, c: perfect)
    assert model.p_losses(z, None, t, noise)[0] == 0
    monkeypatch.setattr(model.net, "apply_model", lambda x, t, c: perfect + 1)
    loss, terms = model.p_losses(z, None, t, noise)
    assert loss == pytest.approx(1, abs=1e-6)
    assert set(terms) == {"loss", "loss_simple", "loss_vlb"}


def test_min_snr_weights_steps_alike_in_terms_of_x0():
    t = torch.tensor([1, 300, 990])
    snr = build().net.alphas_cumprod[t] / (1 - build().net.alphas_cumprod[t])
    assert snr[0] > 5 > snr[-1]
    for parameterization, implied in {"eps": snr, "v": snr + 1, "x0": torch.ones(3)}.items():
        weights = build(parameterization=parameterization, min_snr_gamma=5.0)._snr_weight(t)
        torch.testing.assert_close(weights * implied, snr.clamp(max=5))
    torch.testing.assert_close(build()._snr_weight(t), torch.ones(3))


def test_loss_simple_has_no_weights(monkeypatch):
    torch.manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    found = {}
    for gamma in (None, 5.0):
        model = build(parameterization="v", min_snr_gamma=gamma)
        monkeypatch.setattr(model.net, "apply_model", lambda x, t, c: x)
        loss, terms = model.p_losses(z, None, t, noise)
        found[gamma] = loss, terms["loss_simple"]
    assert found[None][0] == found[None][1] == found[5.0][1]
    assert found[5.0][0] < found[5.0][1]


def test_of_several_processes_all_are_in_a_validation_loss(batch, monkeypatch):
    asked = {}
    model = build()
    monkeypatch.setattr(model, "log_dict", lambda named, **asks: asked.update(asks))
    model.log_terms({"loss": torch.ones(())}, "val", batch)
    assert (asked["sync_dist"], asked["on_step"], asked["on_epoch"]) == (True, False, True)
    model.log_terms({"loss": torch.ones(())}, "train", batch)
    assert (asked["sync_dist"], asked["on_step"], asked["on_epoch"]) == (False, True, False)


def drawn_steps(monkeypatch, **settings):
    drawn = []
    model = build(**settings)
    monkeypatch.setattr(model, "p_losses", lambda x, c, t: drawn.append(t))
    torch.manual_seed(0)
    model(torch.zeros(4000, 4, 1, 1), None)
    assert 0 <= drawn[0].min() <= drawn[0].max() <= 999
    return drawn[0].float()


def test_the_steps_of_training_follow_their_power(monkeypatch):
    for power in (1.0, 0.5):
        steps = drawn_steps(monkeypatch, timestep_power=power)
        assert steps.mean() == pytest.approx(1000 / (1 + power), rel=0.03)


def test_the_steps_of_training_may_be_logit_normal(monkeypatch):
    logits = (drawn_steps(monkeypatch, timestep_logit_normal=[-0.6, 1.0]) + 0.5).div(1000).logit()
    assert logits.mean() == pytest.approx(-0.6, abs=0.05)
    assert logits.std() == pytest.approx(1.0, rel=0.05)
    drawn_steps(monkeypatch, timestep_logit_normal=[0.0, 50.0])
    for wrong in (1.0, [0.0], [0.0, 1.0, 2.0], ["a", 1.0]):
        with pytest.raises(InputError, match=r"timestep_logit_normal .*: give mean and deviation"):
            build(timestep_logit_normal=wrong)


def test_logvar_and_bound_enter_the_loss(monkeypatch):
    z, noise = torch.zeros(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    model = build(logvar_init=1.0, original_elbo_weight=2.0, l_simple_weight=3.0, loss_type="l1")
    monkeypatch.setattr(model.net, "apply_model", lambda x, t, c: noise + 0.5)
    expected = 3 * (0.5 / math.e + 1) + 2 * 0.5 * model.net.lvlb_weights[t].mean()
    assert model.p_losses(z, None, t, noise)[0] == pytest.approx(expected.item())
    learned = build(learn_logvar=True)
    assert isinstance(learned.net.logvar, nn.Parameter)
    assert "logvar" in learned.state_dict()


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
    expected = model.net.encode_first_stage(pictures).sample() * 0.5
    torch.testing.assert_close(z, expected)


def test_text_encoder_gets_a_gradient_only_if_trainable(batch):
    for trainable in (False, True):
        model = build(cond_stage_trainable=trainable)
        _, c = model.get_input(batch)
        assert c.requires_grad == trainable


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InputError, match="'hybrid' cannot be trained"):
        build(conditioning_key="hybrid")
    for rule in ({"p": 1.5}, {"p": "x"}, {"p": 0.1, "val": 3}, {"val": ""}, 0.3):
        with pytest.raises(InputError, match=r"ucg_training\.caption is .*: it needs p"):
            build(ucg_training={"caption": rule})


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


class Ruin(pl.Callback):
    """Undoes what was learnt, as a learning rate does that is a little too high."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            nn.init.normal_(pl_module.net.model.diffusion_model.conv_out.weight, std=5.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("at", "n_said"), [(20, 1), (-1, 0)])
def test_a_loss_far_above_what_it_was_is_said_once(batch, monkeypatch, caplog, at, n_said):
    monkeypatch.setattr(RisenLoss, "WINDOW", 10)
    model = build()
    model.learning_rate = 1e-4
    trainer = fit(model, batch, 40, callbacks=[Ruin(at)])
    said = [r.getMessage() for r in caplog.records if "lost what it had learnt" in r.getMessage()]
    assert len(said) == n_said
    assert all(one.startswith("step 30: the loss of the last 10 steps is") for one in said)
    (watch,) = (one for one in trainer.callbacks if isinstance(one, RisenLoss))
    resumed = RisenLoss()
    resumed.load_state_dict(watch.state_dict())
    assert resumed.lowest == watch.lowest < 2


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
    assert model.net.model_ema.num_updates == 40

    def loss(m):
        torch.manual_seed(5)
        z, c = m.get_input(batch)
        return m(z.repeat(64, 1, 1, 1), c.repeat(64, 1, 1))[0].item()

    before, after = loss(first), loss(model)
    assert after < 0.8 * before
    live = copy.deepcopy(model.net.model.state_dict())
    with model.net.ema_scope():
        assert not torch.equal(
            model.net.model.diffusion_model.conv_in.weight, live[next(iter(live))]
        )
        assert loss(model) < before
    assert all(
        torch.equal(value, live[name]) for name, value in model.net.model.state_dict().items()
    )
    for name, value in first.net.first_stage_model.state_dict().items():
        assert torch.equal(value, model.net.first_stage_model.state_dict()[name])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_scale_by_std_gives_latents_unit_variance(batch):
    model = build(scale_by_std=True, scale_factor=1.0)
    fit(model, batch, 1, limit_val_batches=0)
    assert model.net.scale_factor != 1
    z, _ = model.get_input(batch)
    assert z.std() == pytest.approx(1, abs=0.2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_scale_by_std_leaves_a_checkpoints_scale(batch, tmp_path):
    first = build(scale_by_std=True, scale_factor=1.0)
    first.net.scale_factor.fill_(0.5)
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": first.state_dict()}, path)
    model = build(scale_by_std=True, scale_factor=1.0, ckpt_path=str(path))
    fit(model, batch, 1, limit_val_batches=0)
    assert model.net.scale_factor == 0.5
    latents = {"latent": torch.randn(4, 4, 4, 4), "caption": CAPTIONS}
    with pytest.raises(InputError, match="scale_by_std needs pictures"):
        fit(build(scale_by_std=True, scale_factor=1.0), latents, 1, limit_val_batches=0)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_schedule_and_averages_stay_in_32_bits(precision):
    with pytest.raises(InputError, match=f"precision {precision}: .*need 32 bits"):
        build().take_over({"precision": precision})
    assert build().take_over({"precision": "bf16-mixed"}) == {"precision": "bf16-mixed"}


def test_what_is_dropped_must_be_there(batch):
    with pytest.raises(KeyError, match="txt"):
        build(ucg_training={"txt": {"p": 0.1}}).terms(batch, "train", 0)
    with pytest.raises(InputError, match=r"ucg_training\.image: only captions"):
        build(ucg_training={"image": {"p": 0.0}}).terms(batch, "train", 0)


def test_a_frozen_text_encoder_that_is_to_be_trained_is_said(caplog):
    net = build_model(cond_stage_trainable=True)
    DiffusionTraining(net)
    assert not caplog.messages
    net.cond_stage_model.requires_grad_(False)
    DiffusionTraining(net)
    assert "nothing of the text encoder is trained" in caplog.text


class Noting(Clock):
    """Notes, in place of saving, the run's steps and those that its average has followed."""

    def __init__(self):
        super().__init__(save_every=0)
        self.noted = []

    def save(self, trainer):
        n_averaged = int(trainer.lightning_module.net.model_ema.num_updates)
        self.noted.append((trainer.global_step, n_averaged))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_clock_saves_the_average_of_the_same_step(batch):
    clock = Noting()
    trainer = quiet_trainer(2, limit_val_batches=0)
    trainer.callbacks = [clock, *trainer.callbacks]
    loader = torch.utils.data.DataLoader([batch] * 2, batch_size=None)
    trainer.fit(build(use_ema=True), loader)
    assert clock.noted == [(1, 1), (2, 2), (2, 2)]


def test_log_images_draws_pictures(batch):
    model = build()
    noted = {**batch, "scene": {"place": ["sea"] * 4}}  # whatever else a data set has to say
    pictures = model.log_images(noted, N=2, ddim_steps=2)
    assert set(pictures) == {"inputs", "reconstruction", "samples", "samples_cfg_scale_5.00"}
    assert all(value.shape == (2, 3, 8, 8) for value in pictures.values())
    assert torch.equal(pictures["inputs"], batch["image"][:2].permute(0, 3, 1, 2))
    latents_only = {"latent": torch.randn(4, 4, 4, 4), "caption": CAPTIONS}
    pictures = model.log_images(latents_only, sample=False)
    assert set(pictures) == {"reconstruction"}


def test_a_trained_text_encoder_is_optimised():
    model = build(cond_stage_trainable=True)
    optimized = model.configure_optimizers().param_groups[0]["params"]
    assert any(p is model.net.cond_stage_model.embedding.weight for p in optimized)


def test_the_state_dict_is_the_models_own():
    model = build()
    assert list(model.state_dict()) == list(model.net.state_dict())
    other = build_model()
    nn.init.constant_(other.model.diffusion_model.conv_in.weight, 7.0)
    model.load_state_dict(other.state_dict())
    assert (model.net.model.diffusion_model.conv_in.weight == 7).all()


@pytest.mark.parametrize("target", ["torch.nn.Linear", "ldm.modules.ema.LitEma"])
def test_a_schedule_is_a_schedule(target):
    model = build(scheduler_config={"target": target, "params": {}})
    with pytest.raises(InputError, match="is no Schedule, which is needed here"):
        model.configure_optimizers()
