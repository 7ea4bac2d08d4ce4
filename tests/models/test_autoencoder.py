import json

import pytest
import torch
from golden_util import GOLDEN, fill_parameters, load_golden

from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL, ReconstructionLoss
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

IDENTITY = {"target": "torch.nn.Identity"}
SD = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TINY = {**SD, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": 32}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    loss = {"target": "ldm.models.autoencoder.ReconstructionLoss"}
    return AutoencoderKL(ddconfig=TINY, lossconfig=loss, embed_dim=4)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_state_dict_is_upstreams(name):
    known = json.loads((GOLDEN / f"state_dict_{name}.json").read_text())
    prefix = "first_stage_model."
    wanted = {k.removeprefix(prefix): v[0] for k, v in known.items() if k.startswith(prefix)}
    with torch.device("meta"):
        model = AutoencoderKL(ddconfig=SD, lossconfig=IDENTITY, embed_dim=4)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == wanted


@torch.no_grad()
def test_numbers_are_upstreams():
    tensors, metadata = load_golden("autoencoder_kl")
    model = AutoencoderKL(lossconfig=IDENTITY, **json.loads(metadata["config"])).eval()
    fill_parameters(model, int(metadata["fill_seed"]))
    moments = model.quant_conv(model.encoder(tensors["image"]))
    torch.testing.assert_close(moments, tensors["moments"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(tensors["z"]), tensors["decoded"], atol=2e-5, rtol=1e-4)


def test_weights_to_start_from_are_found_or_missed(tiny, tmp_path, caplog):
    def build(state, **changes):
        torch.save(state, tmp_path / "vae.ckpt")
        arguments = {"ddconfig": TINY, "lossconfig": IDENTITY, "embed_dim": 4, **changes}
        return AutoencoderKL(**arguments, ckpt_path=str(tmp_path / "vae.ckpt"))

    state = tiny.state_dict()
    model = build({n: t for n, t in state.items() if n != "encoder.conv_in.bias"})
    assert torch.equal(model.decoder.conv_in.weight, tiny.decoder.conv_in.weight)
    assert "which stay as they began: 1, such as encoder.conv_in.bias" in caplog.text
    caplog.clear()
    model = build(state, ignore_keys=["encoder."])
    assert not torch.equal(model.encoder.conv_in.weight, tiny.encoder.conv_in.weight)
    assert not caplog.records
    with pytest.raises(InputError, match="has no weights of a first stage in it"):
        build({"model.diffusion_model.out.2.bias": torch.zeros(4)})
    turned = state["encoder.conv_in.weight"].transpose(0, 1)  # as many numbers, of another model
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder\.conv_in\.weight"):
        build({**state, "encoder.conv_in.weight": turned})


def test_attention_resolutions_add_attention():
    config = {**TINY, "attn_resolutions": [16]}
    names = AutoencoderKL(ddconfig=config, lossconfig=IDENTITY, embed_dim=4).state_dict()
    assert "encoder.down.1.attn.0.q.weight" in names
    assert "decoder.up.1.attn.1.q.weight" in names
    assert not any("0.attn" in name for name in names)


def test_upstreams_arguments_are_accepted_where_they_ask_for_nothing():
    arguments = {"ddconfig": TINY, "lossconfig": IDENTITY, "embed_dim": 4}
    AutoencoderKL(**arguments, colorize_nlabels=None, ema_decay=None, learn_logvar=False)
    with pytest.raises(InputError, match=r"AutoencoderKL: ema_decay=0\.999 is not supported"):
        AutoencoderKL(**arguments, ema_decay=0.999)
    with pytest.raises(InputError, match="AutoencoderKL has no argument 'embed_dims'"):
        AutoencoderKL(**arguments, embed_dims=4)


def test_unsupported_attention_is_refused():
    with pytest.raises(ValueError, match="attn_type 'linear'"):
        AutoencoderKL(ddconfig={**TINY, "attn_type": "linear"}, lossconfig=IDENTITY, embed_dim=4)


def test_posterior():
    parameters = torch.cat([torch.full((2, 4, 3, 3), 0.5), torch.full((2, 4, 3, 3), 100.0)], dim=1)
    posterior = DiagonalGaussianDistribution(parameters)
    assert posterior.logvar.max() == 20
    assert torch.equal(posterior.mode(), torch.full((2, 4, 3, 3), 0.5))
    noise = torch.randn(2, 4, 3, 3)
    expected = 0.5 + posterior.std * noise
    assert torch.equal(posterior.sample(noise), expected)
    torch.manual_seed(3)
    drawn = posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(drawn, posterior.sample(torch.randn(2, 4, 3, 3)))
    unit = DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3))
    assert torch.equal(unit.kl(), torch.zeros(2))


def test_loss_sees_colour_and_edges():
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 4, 4))
    loss = ReconstructionLoss()
    x = torch.rand(1, 3, 16, 16)
    assert loss(x, x, posterior)["loss"] == 0
    shifted = loss(x, x + 0.1, posterior)  # a constant has no edges: four scales of 0.1
    assert shifted["loss"].item() == pytest.approx(0.4, abs=1e-5)
    noisy = loss(x, x + 0.1 * torch.sign(torch.randn_like(x)), posterior)
    assert noisy["rec_loss"].item() == pytest.approx(0.1, abs=1e-5)
    assert noisy["loss"] != shifted["loss"]
