"""The first stage's loss with a discriminator."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import InputError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import FeatureDistance, adaptive_weight, texture_distance
from ldm.modules.losses.discriminator import ActNorm, NLayerDiscriminator, hinge_loss, vanilla_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.util import get_obj_from_str


def posterior(mean=0.0):
    return DiagonalGaussianDistribution(torch.cat([torch.full((2, 4, 4, 4), mean)] * 2, dim=1))


def plain(**more):
    return LPIPSWithDiscriminator(**{"disc_start": 10, "perceptual_weight": 0.0, **more})


def test_upstreams_names():
    for path in ("ldm.modules.losses", "ldm.modules.losses.contperceptual"):
        assert get_obj_from_str(f"{path}.LPIPSWithDiscriminator") is LPIPSWithDiscriminator
    names = set(plain().state_dict())
    convolutions = {"0.weight", "0.bias", "2.weight", "5.weight", "8.weight", "11.weight"}
    assert {f"discriminator.main.{name}" for name in convolutions} <= names
    assert "discriminator.main.3.running_mean" in names
    assert "logvar" in names


def test_the_terms_before_the_discriminator():
    x = torch.rand(2, 3, 32, 32)
    terms = plain(kl_weight=0.5)(x, x + 0.25, posterior(2.0))
    n = 3 * 32 * 32
    kl = posterior(2.0).kl().mean().item()
    assert terms["rec_loss"].item() == pytest.approx(0.25)
    assert terms["nll_loss"].item() == pytest.approx(0.25 * n, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.25 * n + 0.5 * kl, rel=1e-5)
    assert "g_loss" not in terms
    halved = plain(logvar_init=1.0)(x, x + 0.25, posterior())
    expected = (0.25 / torch.e + 1) * n
    assert halved["nll_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_coarse_scales_and_edges():
    x = torch.rand(2, 3, 32, 32)
    n = 3 * 32 * 32
    shifted = plain(scales=3, edge_weight=1.0)(x, x + 0.1, posterior())
    assert shifted["nll_loss"].item() == pytest.approx(0.4 * n, rel=1e-4)  # no edges: four scales
    noisy = x + 0.1 * torch.randn_like(x).sign()
    assert plain(edge_weight=1.0)(x, noisy, posterior())["nll_loss"] > 0.15 * n


def test_texture_is_how_strong_not_which():
    noise, other = 0.1 * torch.randn(2, 2, 3, 64, 64)
    assert texture_distance(noise, noise).abs().max() == 0
    assert texture_distance(noise, other).max() < 0.1 * texture_distance(noise, 0 * noise).min()
    terms = plain(texture_weight=2.0)(noise, 0 * noise, posterior())
    wanted = noise.abs().mean() + 2 * texture_distance(noise, 0 * noise).mean()
    assert terms["nll_loss"].item() == pytest.approx(wanted.item() * noise[0].numel(), rel=1e-5)
    flat = torch.zeros(2, 3, 64, 64, requires_grad=True)
    texture_distance(flat, noise).sum().backward()
    assert flat.grad.isfinite().all()


def test_the_discriminator_starts_in_time_with_the_adaptive_weight():
    loss = plain(disc_weight=0.5)
    layer = nn.Conv2d(3, 3, 1)
    x = torch.rand(2, 3, 32, 32)
    made = layer(x)
    assert "d_weight" not in loss(x, made, posterior(), 9, layer.weight)
    terms = loss(x, made, posterior(), 10, layer.weight)
    sums, _ = loss.reconstruction(x, made)
    g_loss = -loss.discriminator(made).mean()
    weight = adaptive_weight(sums.mean(), g_loss, layer.weight)
    gradients = [
        torch.autograd.grad(each, layer.weight, retain_graph=True)[0].norm()
        for each in (sums.mean(), g_loss)
    ]
    expected = (gradients[0] / (gradients[1] + 1e-4)).clamp(max=1e4)
    torch.testing.assert_close(weight, expected)
    assert terms["d_weight"] > 0
    with torch.no_grad():
        assert loss(x, made, posterior(), 10, layer.weight)["d_weight"] == 1


def test_a_discriminator_learns_to_tell():
    torch.manual_seed(0)
    loss = plain(disc_channels=8, disc_num_layers=1)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-3)
    real, fake = torch.rand(8, 3, 16, 16), 0.5 + 0.1 * torch.rand(8, 3, 16, 16)
    losses = []
    for _ in range(30):
        terms = loss.discriminate(real, fake)
        optimizer.zero_grad()
        terms["disc_loss"].backward()
        optimizer.step()
        losses.append(terms["disc_loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert terms["logits_real"] > terms["logits_fake"]


def test_both_discriminator_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    expected = torch.nn.functional.binary_cross_entropy_with_logits
    both = expected(real, torch.ones(2)) + expected(fake, torch.zeros(2))
    torch.testing.assert_close(vanilla_loss(real, fake), 0.5 * both)


def test_actnorm_takes_its_statistics_from_the_first_batch():
    norm = ActNorm(4)
    x = 3 + 2 * torch.randn(8, 4, 16, 16)
    first = norm(x)
    assert first.mean().abs() < 1e-5
    assert first.std().item() == pytest.approx(1, abs=1e-2)
    assert not torch.equal(norm(2 * x), first)
    assert NLayerDiscriminator(3, 8, 2, use_actnorm=True)(torch.rand(2, 3, 32, 32)).shape[1] == 1


def test_the_perceptual_term_is_a_distance_and_not_trained():
    network = nn.Conv2d(3, 8, 3)
    distance = FeatureDistance(lambda x: [network(x)])
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    assert distance(x, x).abs().max() == 0
    assert distance(x, y).shape == (2,)
    torch.testing.assert_close(distance(x, y), distance(y, x))
    loss = LPIPSWithDiscriminator(disc_start=1)  # the demo's classifier
    loss.train()
    assert not loss.perceptual_loss.training
    assert not any(p.requires_grad for p in loss.perceptual_loss.parameters())
    assert loss(x, y, posterior())["p_loss"] > 0


def test_lpips_from_the_users_file(tmp_path):
    network = LPIPS()
    assert "net.slice5.28.weight" in network.state_dict()
    assert "lin4.model.1.weight" in network.state_dict()
    stored = {f"loss.perceptual_loss.{k}": v for k, v in network.state_dict().items()}
    save_file(stored, tmp_path / "stage.safetensors")
    loss = LPIPSWithDiscriminator(disc_start=1, lpips_path=str(tmp_path / "stage.safetensors"))
    x = torch.rand(1, 3, 32, 32)
    assert loss.perceptual_loss(x, x).item() == 0
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors is no LPIPS network"):
        LPIPS.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [({"disc_loss": "wgan"}, "disc_loss 'wgan'"), ({"disc_conditional": True}, "disc_conditional")],
)
def test_what_is_not_supported(value, message):
    with pytest.raises(InputError, match=message):
        plain(**value)
