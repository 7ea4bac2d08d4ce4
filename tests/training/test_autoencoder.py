"""Training of the first stage."""

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL
from ldm.training import run
from ldm.training.autoencoder import AutoencoderTraining, peak_signal_to_noise
from tests.tiny_models import FIRST_STAGE


@pytest.fixture
def tiny():
    loss = {"target": "ldm.models.autoencoder.ReconstructionLoss"}
    return AutoencoderTraining(AutoencoderKL(**{**FIRST_STAGE["params"], "lossconfig": loss}), 1e-3)


def test_training_lowers_the_loss(tiny):
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    optimizer = tiny.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = tiny.terms(batch, "train", 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_psnr_is_the_mean_of_the_pictures_whatever_the_batch():
    pictures = torch.rand(3, 3, 16, 16) - 0.5
    others = pictures + torch.tensor([0.4, 0.01, 0.1])[:, None, None, None]
    pairs = zip(others[:, None], pictures[:, None], strict=True)
    alone = [peak_signal_to_noise(*pair).item() for pair in pairs]
    assert alone == pytest.approx([13.979, 46.021, 26.021], abs=1e-3)
    assert peak_signal_to_noise(others, pictures).item() == pytest.approx(sum(alone) / 3)
    assert peak_signal_to_noise(pictures, pictures) == 100


def test_logged_pictures(tiny):
    drawn = tiny.log_images({"image": torch.zeros(6, 16, 16, 3)}, N=2)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        "inputs": (2, 3, 16, 16),
        "reconstructions": (2, 3, 16, 16),
    }


def adversarial(disc_start):
    loss = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": disc_start, "perceptual_weight": 0, "disc_channels": 8},
    }
    loss["params"]["disc_num_layers"] = 1
    params = {**FIRST_STAGE["params"], "lossconfig": loss}
    return AutoencoderTraining(AutoencoderKL(**params), 1e-3)


def fit(training, n_steps):
    pictures = [{"image": torch.rand(16, 16, 3) * 2 - 1} for _ in range(8)]
    trainer = pl.Trainer(
        max_steps=n_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, DataLoader(pictures, batch_size=2))
    return trainer


def test_a_discriminator_is_trained_in_turn():
    training = adversarial(disc_start=2)
    before = {name: value.clone() for name, value in training.state_dict().items()}
    judge = "loss.discriminator.main.0.weight"
    trainer = fit(training, 2)  # the batches before it starts
    assert trainer.global_step == 2
    after = training.state_dict()
    assert torch.equal(after[judge], before[judge])
    assert not torch.equal(after["decoder.conv_out.weight"], before["decoder.conv_out.weight"])
    assert not torch.equal(after["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    trainer = fit(training, 4)
    assert trainer.global_step == 4  # its steps do not count
    assert not torch.equal(training.state_dict()[judge], before[judge])
    assert {"train/d_weight", "train/disc_loss", "train/psnr"} <= set(trainer.logged_metrics)


def test_both_optimizers_are_upstreams():
    optimizers, _ = adversarial(disc_start=0).configure_optimizers()
    assert [type(each) for each in optimizers] == [torch.optim.Adam] * 2
    for each in optimizers:
        assert each.defaults["betas"] == (0.5, 0.9)
        assert each.defaults["weight_decay"] == 0


def test_gradients_are_gathered_and_clipped():
    training = adversarial(disc_start=0)
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-9, "max_steps": 2}
    assert training.take_over(settings) == {"max_steps": 2}
    before = training.state_dict()["decoder.conv_out.weight"].clone()
    trainer = fit(training, 2)
    assert trainer.global_step == 2
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 4
    moved = training.state_dict()["decoder.conv_out.weight"] - before
    assert 0 < moved.abs().max() < 1e-3  # of two steps at a rate of 1e-3, with gradients this small


UPSTREAM = """
model:
  base_learning_rate: 4.5e-6
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: "val/rec_loss"
    embed_dim: 4
    lossconfig:
      target: ldm.modules.losses.LPIPSWithDiscriminator
      params: {disc_start: 1, kl_weight: 0.000001, disc_weight: 0.5}
    ddconfig: {double_z: True, z_channels: 4, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,
      ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: &pictures
      target: ldm.demo.rendered.RenderedScenes
      params: {n_pictures: 8, size: 32}
    validation: *pictures
lightning:
  callbacks:
    image_logger:
      target: main.ImageLogger
      params: {batch_frequency: 1000, max_images: 8, increase_log_steps: True}
  trainer: {benchmark: True, accumulate_grad_batches: 2}
"""


def test_upstreams_autoencoder_yaml_trains(tmp_path, capsys):
    (tmp_path / "autoencoder.yaml").write_text(UPSTREAM)
    files = ["--base", str(tmp_path / "autoencoder.yaml"), "--logdir", str(tmp_path / "logs")]
    run.main([*files, "--train", "--max_steps", "2", "--accelerator", "cpu", "--devices", "1"])
    assert "Learning rate: 1.80e-05" in capsys.readouterr().out  # 2 pictures, 2 batches gathered
    checkpoint = next((tmp_path / "logs").glob("*/checkpoints/last.ckpt"))
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    assert "loss.discriminator.main.8.weight" in state["state_dict"]


def test_the_decoder_alone_is_trained_on_noisy_latents():
    params = {**FIRST_STAGE["params"], "train_encoder": False, "latent_noise": 0.5}
    loss = {"target": "ldm.models.autoencoder.ReconstructionLoss"}
    training = AutoencoderTraining(AutoencoderKL(**{**params, "lossconfig": loss}), 1e-3)
    before = {name: value.clone() for name, value in training.state_dict().items()}
    fit(training, 2)
    changed = {n for n, v in training.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    x = torch.rand(2, 3, 16, 16)
    plain = training.net.decode(training.net.encode(x).mode())
    assert not torch.allclose(training.net.disturbed(x)[0], plain, atol=1e-4)


def test_weights_to_start_from(tmp_path):
    loss = {"target": "torch.nn.Identity"}
    first = AutoencoderKL(**{**FIRST_STAGE["params"], "lossconfig": loss})
    stored = {f"first_stage_model.{k}": v for k, v in first.state_dict().items()}
    save_file(stored, tmp_path / "a.safetensors")
    params = {**FIRST_STAGE["params"], "lossconfig": loss}
    path = str(tmp_path / "a.safetensors")
    second = AutoencoderKL(**params, ckpt_path=path, ignore_keys=["encoder."])
    name = "decoder.conv_out.weight"
    assert torch.equal(second.state_dict()[name], first.state_dict()[name])
    name = "encoder.conv_out.weight"
    assert not torch.equal(second.state_dict()[name], first.state_dict()[name])
