import copy

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))
    model[0].bias.requires_grad_(False)
    return model


def test_buffers_have_upstream_names(model):
    state = LitEma(model).state_dict()
    assert set(state) == {"decay", "num_updates", "0weight", "10weight", "10bias"}
    assert state["decay"].dtype == torch.float32
    assert state["num_updates"].dtype == torch.int32
    assert torch.equal(state["0weight"], model[0].weight)
    assert not any(p.requires_grad for p in LitEma(model).parameters())


def test_average_follows_upstreams_rule(model):
    ema = LitEma(model)
    shadow = model[0].weight.detach().clone()
    for n in range(1, 6):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema(model)
        decay = min(0.9999, (1 + n) / (10 + n))
        shadow -= (1 - decay) * (shadow - model[0].weight.detach())
    assert ema.num_updates == 5
    torch.testing.assert_close(getattr(ema, "0weight"), shadow)


@pytest.mark.parametrize(("decay", "n_updates"), [(0.5, 1000), (0.9, -1)])
def test_decay_has_its_limit_or_is_constant(model, decay, n_updates):
    ema = LitEma(model, decay, use_num_upates=n_updates >= 0)
    ema.num_updates += max(n_updates, 0)
    before = getattr(ema, "0weight").clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema(model)
    torch.testing.assert_close(getattr(ema, "0weight"), before + 1 - decay)
    assert ema.num_updates == (n_updates + 1 if n_updates >= 0 else -1)


def test_weights_are_restored_even_after_an_error(model):
    ema = LitEma(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    live = copy.deepcopy(model.state_dict())

    def use():
        with ema.applied_to(model):
            assert torch.equal(model[0].weight, getattr(ema, "0weight"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_impossible_decays_are_refused(model, decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        LitEma(model, decay=decay)
