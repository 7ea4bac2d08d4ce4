import pytest

from ldm.demo.check_program import main
from ldm.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n_prompts", "0"], "--n_prompts 0: allowed is 1 to 100000"),
        (["--n_controls", "-1"], "--n_controls -1: allowed is 0 to 100000"),
        (["--steps", "0"], "--steps 0: allowed is 1 to 1000"),
        (["--pixels", "9"], "--pixels 9: allowed is 64 to 4096"),
        (["--only", "stars"], "--only stars: allowed is NAME=VALUE with place, time, light_pos"),
        (["--only", "sky=red"], "--only sky=red: sky can be plain, clouds, stars"),
    ],
)
def test_bad_values(arguments, complaint, monkeypatch):
    monkeypatch.setattr("ldm.checkpoint.load.load_model", None)  # nothing heavy comes before
    with pytest.raises(InputError) as error:
        main(arguments)
    assert complaint in str(error.value)
