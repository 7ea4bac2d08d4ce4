import numpy as np
import pytest

from ldm.errors import InputError
from ldm.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("n_samples", 0, "1 to 4096"),
        ("n_iter", -1, "1 to 1000000"),
        ("steps", 0, "1 to 1000"),
        ("steps", 1001, "1 to 1000"),
        ("sampler", "huen", "ddim, plms, dpm_solver, euler, euler_a, dpmpp_2m, heun, .* lcm"),
        ("schedule", "exponential", "uniform, karras, sgm_uniform"),
        ("scale", float("nan"), "-1000 to 1000"),
        ("eta", 1.5, "0 to 1"),
        ("strength", 1.01, "0 to 1"),
        ("strength", -0.1, "0 to 1"),
        ("hires_scale", 0.5, "1 .off. to 8"),
        ("hires_strength", 2, "0 to 1"),
        ("hires_steps", 0, "1 to 1000"),
        ("hires_upscaler", "esrgan", "latent, lanczos"),
        ("rng", "gpu", "image, upstream"),
        ("seed", -2, "-1 for any"),
        ("H", 0, "1 to 16384"),
        ("W", -8, "1 to 16384"),
        ("prompt", (), "at least one text"),
        ("prompt", ("a", 3), "a text"),
        ("prompt", 3, "a text"),
        ("prompt", "x" * 100_001, "at most 100000 characters"),
        ("negative_prompt", None, "a text"),
        ("n_samples", 10**9, "1 to 4096"),
        ("n_samples", 2.0, "a whole number"),
        ("n_iter", 10**4000, "1 to 1000000"),
        ("steps", True, "a whole number"),
        ("steps", "20", "a whole number"),
        ("scale", 1e30, "-1000 to 1000"),
        ("scale", float("inf"), "-1000 to 1000"),
        ("H", 10**12, "1 to 16384"),
        ("seed", 2**63, "0 to 2..63 - 1"),
        ("emphasis", "yes", "true, false"),
    ],
)
def test_values_out_of_range_are_refused_with_the_limit(name, value, limit):
    with pytest.raises(InputError, match=f"{name} .*{limit}") as caught:
        Settings(**{"prompt": "x", name: value})
    assert len(str(caught.value)) < 250


def test_a_text_where_a_number_belongs_is_shown_as_a_text():
    with pytest.raises(InputError, match=r"^steps '3': allowed is a whole number, 1 to 1000$"):
        Settings(steps="3")
    with pytest.raises(InputError, match=r"^scale '7': allowed is a number, -1000 to 1000$"):
        Settings(scale="7")


def test_numbers_of_numpy_are_numbers():
    settings = Settings(seed=np.int64(7), steps=np.uint8(9), scale=np.float32(2), eta=np.int32(1))
    assert repr((settings.seed, settings.steps, settings.scale, settings.eta)) == "(7, 9, 2.0, 1)"
    for value in (np.bool_(True), np.float64(7), np.array([7])):
        with pytest.raises(InputError, match=r"seed .*a whole number"):
            Settings(seed=value)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_schedule_is_a_choice_of_three_samplers(sampler):
    with pytest.raises(InputError, match=f"karras needs .* lcm, not {sampler}"):
        Settings("x", sampler=sampler, schedule="karras")
    with pytest.raises(InputError, match="schedule karras needs"):
        Settings("x", schedule="karras").filled({"sampler": sampler})
    Settings("x", sampler="dpmpp_2m", schedule="karras")


@pytest.mark.parametrize("sampler", ["plms", "dpm_solver", "euler_a"])
def test_eta_needs_ddim(sampler):
    with pytest.raises(InputError, match=r"eta 0\.5 needs the ddim sampler"):
        Settings("x", sampler=sampler, eta=0.5)
    Settings("x", sampler="ddim", eta=0.5)


def test_sizes_are_rounded_with_a_message(caplog):
    caplog.set_level("INFO", "ldm")
    settings = Settings("x", H=100, W=3)
    assert (settings.H, settings.W) == (96, 8)
    assert "H 100 is not a multiple of 8" in caplog.text
    caplog.clear()
    Settings("x", H=104, W=8)
    assert caplog.text == ""


def test_a_seed_can_be_chosen_for_the_user(caplog):
    caplog.set_level("INFO", "ldm")
    seeds = {Settings("x", seed=-1).seed for _ in range(3)}
    assert all(f"The seed is {seed}" in caplog.messages for seed in seeds)
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_defaults_fill_what_is_open():
    defaults = {"H": 64, "W": 32, "steps": 5, "scale": 3.0, "sampler": "plms", "prompt": "hills"}
    filled = Settings(steps=7).filled(defaults)
    assert (filled.H, filled.W, filled.steps, filled.scale) == (64, 32, 7, 3.0)
    assert (filled.sampler, filled.prompt) == ("plms", "hills")


def test_the_second_pass_is_larger_and_has_its_own_steps():
    first = Settings("x", H=64, W=40, steps=20, hires_scale=1.5, hires_strength=0.4)
    second = first.second_pass()
    assert (second.H, second.W, second.steps, second.strength) == (96, 64, 20, 0.4)
    assert second.hires_scale == 1
    assert Settings("x", H=64, W=40, steps=20, hires_steps=7).second_pass().steps == 7


def test_half_a_character_is_refused():
    with pytest.raises(InputError, match=r"prompt 'a.ud800': character 2 is half of one"):
        Settings("a\ud800")


def test_a_second_pass_may_be_too_large():
    with pytest.raises(InputError, match="H 24000: allowed is"):
        Settings("x", H=3000, W=8, hires_scale=8).second_pass()


def test_one_prompt_makes_n_samples_times_n_iter():
    settings = Settings("x", n_samples=2, n_iter=2, seed=5)
    assert list(settings.batches()) == [[("x", 5), ("x", 6)], [("x", 7), ("x", 8)]]
    assert settings.n_pictures == 4


def test_several_prompts_go_in_batches_and_the_last_may_be_short():
    settings = Settings(("a", "b", "c"), n_samples=2, n_iter=2, seed=0)
    expected = [[("a", 0), ("b", 1)], [("c", 2)], [("a", 3), ("b", 4)], [("c", 5)]]
    assert list(settings.batches()) == expected
    assert list(settings.batches()[1::2]) == expected[1::2]
    assert (len(settings.batches()), settings.n_pictures) == (4, 6)


def test_huge_numbers_of_pictures_take_no_memory():
    settings = Settings(("a", "b", "c", "d"), n_samples=3, n_iter=10**6, seed=2**62)
    assert (len(settings.batches()), settings.n_pictures) == (2 * 10**6, 4 * 10**6)
    first = 2**62 + 4 * 100_005
    assert settings.batches()[10::2][10**5] == [("a", first), ("b", first + 1), ("c", first + 2)]


def test_the_batch_size_does_not_change_who_gets_which_seed():
    prompts = tuple("abcde")
    flat = []
    for n in (1, 2, 5, 9):
        batches = Settings(prompts, n_samples=n, n_iter=2).batches()
        flat.append([picture for batch in batches for picture in batch])
    assert flat == [flat[0]] * 4


def test_without_any_prompt_there_is_nothing_to_draw():
    with pytest.raises(InputError, match="no prompt"):
        Settings().batches()
