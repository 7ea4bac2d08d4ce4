import pytest
from omegaconf import OmegaConf

from ldm.errors import InputError
from ldm.util import get_obj_from_str, instantiate_from_config


def test_builds_with_plain_values():
    config = OmegaConf.create({"target": "builtins.dict", "params": {"a": [1, 2], "b": {"c": 3}}})
    built = instantiate_from_config(config, d=4)
    assert built == {"a": [1, 2], "b": {"c": 3}, "d": 4}
    assert type(built["a"]) is list
    assert type(built["b"]) is dict


def test_placeholders_and_missing_target():
    assert instantiate_from_config("__is_first_stage__") is None
    assert instantiate_from_config("__is_unconditional__") is None
    with pytest.raises(KeyError, match="target"):
        instantiate_from_config({"params": {}})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("plain", "not a dotted path"),
        ("ldm.models.nothing.X", r"no module 'ldm\.models\.nothing'"),
        ("nowhere.X", "no module 'nowhere'"),
        ("ldm.util.X", "has no 'X'"),
    ],
)
def test_bad_targets(path, message):
    with pytest.raises(InputError, match=message):
        get_obj_from_str(path)


def test_upstreams_names_resolve():
    assert get_obj_from_str("main.DataModuleFromConfig").__module__ == "ldm.training.lightning"
    inpainting = get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
    assert inpainting.__name__ == "LatentDiffusion"
