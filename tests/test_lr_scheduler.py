import pytest

from ldm.errors import InputError
from ldm.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)

CYCLES = {
    "warm_up_steps": [10, 5],
    "f_start": [0.0, 0.1],
    "f_max": [1.0, 0.5],
    "f_min": [0.2, 0.1],
    "cycle_lengths": [100, 50],
}


def test_warm_up_and_cosine():
    schedule = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 110).schedule
    assert [schedule(n) for n in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == schedule(10_000) == pytest.approx(0.1)


def test_stable_diffusions_schedule():
    scheduler = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10_000_000_000_000])
    assert scheduler(0) == pytest.approx(1e-6)
    assert scheduler(5000) == pytest.approx(0.5, abs=1e-5)
    assert scheduler(10000) == 1.0
    assert scheduler(10**9) == pytest.approx(1.0)


def test_linear_cycles():
    schedule = LambdaLinearScheduler(**CYCLES).schedule
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(50) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule(100) == pytest.approx(0.2)
    assert schedule(101) == pytest.approx(0.1 + 0.4 / 5)
    assert schedule(125) == pytest.approx(0.1 + 0.4 * 0.5)


def test_cosine_cycles():
    schedule = LambdaWarmUpCosineScheduler2(**CYCLES).schedule
    assert schedule(10) == pytest.approx(1.0)
    assert schedule(55) == pytest.approx(0.6)
    assert schedule(100) == pytest.approx(0.2)
    assert schedule(105) == pytest.approx(0.5)


@pytest.mark.parametrize("scheduler", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])
def test_final_factor_holds_past_the_last_cycle(scheduler):
    schedule = scheduler(**CYCLES).schedule
    assert schedule(150) == schedule(151) == schedule(10_000) == pytest.approx(0.1)


def test_a_cycle_that_is_all_warm_up():
    schedule = LambdaWarmUpCosineScheduler2([10], [0.5], [1.0], [0.0], [10]).schedule
    assert schedule(9) == pytest.approx(0.9)
    assert schedule(10) == pytest.approx(1.0)


def test_unequal_lists_are_refused():
    with pytest.raises(InputError, match=r"their lengths are \[2, 2, 2, 2, 1\]"):
        LambdaLinearScheduler(**{**CYCLES, "cycle_lengths": [100]})


@pytest.mark.parametrize("scheduler", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])
@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({name: [] for name in CYCLES}, r"need one value for each cycle.* \[0, 0, 0, 0, 0\]"),
        ({**CYCLES, "cycle_lengths": [100, 0]}, r"cycle_lengths \[100, 0\].* at least 1 step"),
        ({**CYCLES, "warm_up_steps": [-1, 5]}, r"warm_up_steps \[-1, 5\]: .* warm-up at least 0"),
    ],
)
def test_cycles_without_a_step_are_refused(scheduler, lists, message):
    with pytest.raises(InputError, match=message):
        scheduler(**lists)


def test_decay_must_follow_the_warm_up():
    with pytest.raises(InputError, match="max_decay_steps 10 must be above warm_up_steps 10"):
        LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 10)


def test_report(capsys):
    scheduler = LambdaLinearScheduler(**CYCLES, verbosity_interval=10)
    for n in range(1, 20):
        scheduler(n)
    assert capsys.readouterr().out == "step 10: learning-rate factor 0.92\n"
