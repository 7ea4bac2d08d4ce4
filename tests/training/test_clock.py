"""Training by the clock."""

from types import SimpleNamespace

import pytest
import torch

import ldm.training.clock as module
from ldm.errors import InputError
from ldm.training.callbacks import RisenLoss
from ldm.training.clock import Clock, rate_factor
from ldm.training.module import Training


def test_the_rate_is_level_and_then_falls():
    assert rate_factor(0.0, 0.4, 0.1) == 1
    assert rate_factor(0.6, 0.4, 0.1) == 1
    assert rate_factor(0.8, 0.4, 0.1) == pytest.approx(0.55)
    assert rate_factor(1.0, 0.4, 0.1) == pytest.approx(0.1)
    assert rate_factor(2.0, 0.4, 0.1) == pytest.approx(0.1)
    assert rate_factor(1.0, 0.0, 0.1) == 1


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A clock whose time goes on by a second a step, and a trainer for it."""
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.value)
    monkeypatch.setattr(module, "core_seconds", lambda n: now.value / 2 * n)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    trainer = SimpleNamespace(
        optimizers=[optimizer],
        callbacks=[],
        global_step=0,
        logged_metrics={"train/loss": torch.tensor(2.0), "val/loss": torch.tensor(3.0)},
        should_stop=False,
        interrupted=False,
        default_root_dir=tmp_path,
        callback_metrics={"val/loss": torch.tensor(3.0)},
        save_checkpoint=lambda path: path.write_bytes(b"weights"),
        world_size=2,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda times: times),
    )

    def step(clock):
        clock.on_train_batch_start(trainer, None, None, 0)
        rate = optimizer.param_groups[0]["lr"]
        now.value += 1
        trainer.global_step += 1
        clock.on_train_batch_end(trainer, None, None, {"x": [1, 2, 3]}, 0)
        return rate

    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    return path, trainer, step


def test_a_run_takes_its_time_in_two_calls(timed):
    path, trainer, step = timed
    clock = Clock(seconds=10, this_call=4, warm_up=2, decay=0.5, save_every=2)
    clock.on_train_start(trainer, Training(torch.nn.Identity(), 0.4))
    assert [step(clock) for _ in range(3)] == pytest.approx([0.2, 0.4, 0.4])
    assert path.read_bytes() == b"weights"
    assert not trainer.should_stop
    step(clock)
    assert trainer.should_stop
    clock.on_train_end(trainer, None)
    assert clock.state_dict() == {"spent": 4, "pictures": 24, "losses": {"train/loss": 2.0}}

    again = Clock(seconds=10, warm_up=0, decay=0.5)
    again.load_state_dict(clock.state_dict())
    trainer.should_stop = False
    again.on_train_start(trainer, Training(torch.nn.Identity(), 0.4))
    rates = [step(again) for _ in range(6)]
    assert rates[0] == pytest.approx(0.4)
    assert rates == sorted(rates, reverse=True)
    assert trainer.should_stop
    again.on_validation_end(trainer, None)
    again.on_train_end(trainer, None)
    progress = module.json.loads(path.with_name("progress.json").read_text())
    assert (progress["seconds"], progress["pictures"], progress["is_over"]) == (10, 60, True)
    assert progress["losses"] == {"train/loss": 2.0, "val/loss": 3.0}


def test_without_a_time_the_rate_is_left_alone(timed):
    _, trainer, step = timed
    clock = Clock()
    clock.on_train_start(trainer, Training(torch.nn.Identity(), 0.4))
    assert step(clock) == 1.0
    clock.on_train_end(trainer, None)  # the run's own end
    assert clock.is_over


def test_of_several_processes_the_first_ones_clock_decides(timed):
    path, trainer, step = timed
    trainer.strategy.broadcast = lambda own: (7.0, False, True)
    clock = Clock(seconds=10, this_call=1, save_every=1e9)
    clock.on_train_start(trainer, Training(torch.nn.Identity(), 0.4))
    step(clock)
    assert clock.spent == 7
    assert not trainer.should_stop  # its own time for this call is up
    assert path.is_file()
    trainer.strategy.broadcast = lambda own: (7.0, True, False)
    step(clock)
    assert trainer.should_stop


def test_a_model_that_has_lost_what_it_had_learnt_is_not_saved(timed):
    path, trainer, step = timed
    watch = RisenLoss()
    trainer.callbacks = [watch]
    clock = Clock(seconds=10, save_every=1)
    clock.on_train_start(trainer, Training(torch.nn.Identity(), 0.4))
    step(clock)
    path.unlink()
    watch.has_risen = True
    with pytest.raises(InputError, match="at step 2 the model has lost what it had learnt; delete"):
        step(clock)
    assert not path.exists()
