import os

import pytest
import yaml

from ldm import config as config_module
from ldm.config import (
    find_config,
    load_config,
    load_preset,
    load_yaml,
    model_configs,
    model_defaults,
    model_tome,
    shipped,
)
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig, ToMeWish, overlay
from ldm.util import get_obj_from_str

STABLE_DIFFUSION = {
    # name: input channels, context, linear projections, parameterization, conditioning, H, scale
    "v1-inference": (4, 768, False, "eps", "crossattn", 512, 7.5),
    "v1-inpainting-inference": (9, 768, False, "eps", "hybrid", 512, 7.5),
    "v2-inference": (4, 1024, True, "eps", "crossattn", 512, 9.0),
    "v2-inference-v": (4, 1024, True, "v", "crossattn", 768, 9.0),
    "v2-inpainting-inference": (9, 1024, True, "eps", "hybrid", 512, 9.0),
}


def shipped_model(name):
    return load_config(f"configs/stable-diffusion/{name}.yaml")


# --- the shipped files ------------------------------------------------------------------------


def test_all_five_stable_diffusion_files_are_shipped():
    folder = shipped("configs/stable-diffusion")
    assert {path.stem for path in folder.glob("*.yaml")} == set(STABLE_DIFFUSION)
    assert set(folder.glob("*.yaml")) <= set(model_configs())


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_shipped_model_has_upstreams_values(name):
    params = shipped_model(name)["model"]["params"]
    unet = params["unet_config"]["params"]
    found = (
        unet["in_channels"],
        unet["context_dim"],
        unet.get("use_linear_in_transformer", False),
        params.get("parameterization", "eps"),
        params["conditioning_key"],
    )
    assert found == STABLE_DIFFUSION[name][:5]
    assert (params["linear_start"], params["linear_end"]) == (0.00085, 0.0120)
    assert (params["timesteps"], params["scale_factor"]) == (1000, 0.18215)
    assert unet["model_channels"] == 320
    assert unet["channel_mult"] == [1, 2, 4, 4]
    assert ("num_head_channels" in unet) == name.startswith("v2")
    assert params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 2, 4, 4]


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_shipped_defaults(name):
    H, scale = STABLE_DIFFUSION[name][5:]
    defaults = model_defaults(shipped_model(name))
    assert (defaults["H"], defaults["W"], defaults["C"], defaults["f"]) == (H, H, 4, 8)
    assert (defaults["scale"], defaults["steps"], defaults["sampler"]) == (scale, 50, "ddim")
    assert len(defaults["prompt"]) > 10


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_every_target_of_a_shipped_model_can_be_imported(name):
    def targets(node):
        if isinstance(node, dict):
            yield from ([node["target"]] if "target" in node else [])
            for child in node.values():
                yield from targets(child)

    found = list(targets(shipped_model(name)))
    assert len(found) >= 5
    for target in found:
        assert callable(get_obj_from_str(target))


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_token_merging_is_off_until_the_hashes_are_removed(name):
    text = shipped(f"configs/stable-diffusion/{name}.yaml").read_text()
    unet = shipped_model(name)["model"]["params"]["unet_config"]["params"]
    assert ToMeConfig.from_mapping(unet.get("tome_config")).is_off
    start = text.index("# tome_config:")
    end = text.index("\n\n", start)
    shown = text[:start] + text[start:end].replace("# ", "") + text[end:]
    unet = yaml.safe_load(shown)["model"]["params"]["unet_config"]["params"]
    assert unet["in_channels"]
    assert not ToMeConfig.from_mapping(unet["tome_config"]).is_off


# --- where files are --------------------------------------------------------------------------


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/stable-diffusion/v1-inference.yaml")["model"]


def test_an_installed_package_finds_its_data_inside_itself(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "ldm"
    monkeypatch.setattr(config_module, "__file__", str(package / "config.py"))
    assert shipped("configs/tome") == package / "shipped" / "configs" / "tome"
    # another package's folder of that name beside it changes nothing
    (tmp_path / "site-packages" / "configs").mkdir(parents=True)
    assert shipped("configs/tome") == package / "shipped" / "configs" / "tome"


def test_a_users_own_file_comes_before_the_shipped_one(tmp_path, monkeypatch):
    own = tmp_path / "configs" / "stable-diffusion" / "v1-inference.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("mine: true")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/stable-diffusion/v1-inference.yaml") == {"mine": True}


def test_missing_file_names_the_shipped_ones():
    with pytest.raises(InputError, match=r"no configuration 'nowhere.yaml'.*v1-inference.yaml"):
        load_config("nowhere.yaml")


def test_folder_is_no_configuration(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        find_config(tmp_path)


# --- merging ----------------------------------------------------------------------------------


def test_files_merge_from_left_to_right_and_overrides_come_last(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {one: 1, two: 2}\nlist: [1, 2]\nkept: yes")
    (tmp_path / "b.yaml").write_text("x: {two: 20, three: '${x.one}'}\nlist: [3]")
    merged = load_config(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["x.one=5", "x.four=1e-3", "name=a b"]
    )
    assert merged == {
        "x": {"one": 5, "two": 20, "three": 5, "four": 1e-3},
        "list": [3],
        "kept": True,
        "name": "a b",
    }
    assert type(merged["x"]) is dict
    assert type(merged["list"]) is list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"\xff\xfe\x00binary", "UTF-16"),
        (b"- a\n- b", "top level must be"),
        (b"a: ${nowhere}", "configuration: .*nowhere"),
        (b"a: ${oc.env:HOME}", "is no reference to a key"),
        (b"a: x${oc.decode:'1'}y", "is no reference to a key"),
        (b"a: ${${b}}\nb: a", "is no reference to a key"),
        (b"a: ${.b}\nb: 1", "is no reference to a key"),
        (b"a: ${b}\nb: ${a}", "leads back to itself"),
        (b"a: {b: '${a}'}", "leads back to itself"),
        (b"a: x${b}\nb: [1]", "too much to be a part of a text"),
        (b"a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (b"a: 1\na: 2", "'a' is there twice"),
        (b"a: !!binary aGk=", "neither text nor a number"),
        (b"a: !!set {b}", "neither text nor a number"),
        (b"a: .inf", "no finite number"),
        (b"1: a", "the key 1 is not a text"),
        (b"on: a", "the key True is not a text"),
        (b'a: "\\ud800"', "lone surrogate"),
        (b"a: &a [*a]", "holds itself"),
        (b"a: " + b"[" * 10**5, "nested deeper"),
        (b"a: " + b"[" * 40 + b"]" * 40, "nested deeper"),
        (b"a: 1" + b":1" * 10**5, "too long for a number"),
        (b"a: " + b"9" * 10**5, "too long for a number"),
        (b"a: [" + b"1," * 30_000 + b"]", "more than 20000 values"),
        (b"a: " + b" " * 2**21, "larger than 1048576 bytes"),
    ],
)
def test_yaml_is_bounded_data_or_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


# the first level, and what each of nine others makes of the one below
BOMBS = {
    "aliases": ("&l0 [x]", "&l{n} [" + "*l{m}, " * 10 + "]"),
    "merge keys": ("&l0 {{x: 1}}", "&l{n} {{<<: [" + "*l{m}, " * 10 + "]}}"),
    "references": ("x", "[" + "'${{l{m}}}', " * 10 + "]"),
    "texts": ("x" * 1000, "${{l{m}}}" * 10),
    "depth": ("&l0 [x]", "&l{n} " + "[" * 9 + "*l{m}" + "]" * 9),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_does_not_become_a_large_configuration(tmp_path, kind):
    lines = [f"l{n}: " + BOMBS[kind][n > 0].format(n=n, m=n - 1) for n in range(10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"more than|deeper|too much"):
        load_yaml(tmp_path / "bomb.yaml")


def test_what_yaml_has_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "a: &a {x: 1e-4, y: yes, z: ~}\nb: {<<: *a, x: 2}\nc: 2024-01-31\nd: 'v${b.x} ${a.y}'\n"
        "e: ${b}\nf: 1.5e3\ng: '$5 {ok}'"
    )
    assert load_yaml(tmp_path / "a.yaml") == {
        "a": {"x": 1e-4, "y": True, "z": None},
        "b": {"x": 2, "y": True, "z": None},
        "c": "2024-01-31",
        "d": "v2 True",
        "e": {"x": 2, "y": True, "z": None},
        "f": 1500.0,
        "g": "$5 {ok}",
    }


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="pipe"):
        load_yaml(tmp_path / "pipe.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml", ["a=1"]) == {"a": 1}


@pytest.mark.parametrize("item", ["novalue", "=5", "a.b"])
def test_malformed_override(item):
    with pytest.raises(InputError, match="not of the form"):
        load_config([], [item])


# --- defaults ---------------------------------------------------------------------------------


def test_defaults_of_upstreams_file_follow_from_the_model():
    config = shipped_model("v1-inference")
    del config["defaults"]
    defaults = model_defaults(config)
    assert defaults == {
        "H": 512,
        "W": 512,
        "C": 4,
        "f": 8,
        "scale": 7.5,
        "steps": 50,
        "sampler": "ddim",
        "prompt": "a painting of a virus monster playing guitar",
    }


def test_the_files_own_defaults_win():
    config = shipped_model("v1-inference")
    config["defaults"] = {"H": 64, "prompt": "hills"}
    defaults = model_defaults(config)
    assert (defaults["H"], defaults["W"], defaults["prompt"]) == (64, 512, "hills")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"step": 3}, "'step' is none of its keys, which are H, W,"),
        ({"steps": "many"}, "defaults: steps"),
        ({"H": 10**12}, "defaults: H"),
        ({"sampler": "magic"}, "defaults: sampler"),
        ({"prompt": 3}, "defaults: prompt"),
        ([1], "must be 'key: value'"),
        (3, "must be 'key: value'"),
    ],
)
def test_defaults_that_cannot_be_are_one_line(defaults, message):
    config = shipped_model("v1-inference") | {"defaults": defaults}
    with pytest.raises(InputError, match=message):
        model_defaults(config)


@pytest.mark.parametrize("size", ["x", [8], None, 10**12, -1, [1, "a"]])
def test_sizes_that_cannot_be_are_one_line(size):
    config = shipped_model("v1-inference")
    config["model"]["params"]["image_size"] = size
    del config["defaults"]
    with pytest.raises(InputError):
        model_defaults(config)
    config["model"]["params"]["image_size"] = [64, 96]
    assert (model_defaults(config)["H"], model_defaults(config)["W"]) == (512, 768)


@pytest.mark.parametrize("config", [{}, {"model": {"params": {}}}, {"model": None}])
def test_no_defaults_without_a_model(config):
    with pytest.raises(InputError, match="no latent-diffusion model"):
        model_defaults(config)


# --- presets ----------------------------------------------------------------------------------


@pytest.fixture
def presets(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "tome"
    folder.mkdir(parents=True)
    (folder / "half.yaml").write_text("method: bipartite\nratio: 0.5")
    (folder / "grid.yaml").write_text("method: grid\nratio: 0.5\nstride: [2, 2]")
    monkeypatch.setattr(config_module, "shipped", lambda path: tmp_path / path)


@pytest.mark.usefixtures("presets")
def test_preset_by_name():
    assert load_preset("half") == {"method": "bipartite", "ratio": 0.5}


def test_preset_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("ratio: 0.3")
    assert load_preset(tmp_path / "mine.yaml", may_be_path=True) == {"ratio": 0.3}
    with pytest.raises(InputError, match="no ToMe preset"):  # not from a page or a picture
        load_preset(tmp_path / "mine.yaml")


@pytest.mark.usefixtures("presets")
@pytest.mark.parametrize("name", ["nope", "nope.yaml", "../tome/half", ""])
def test_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"no ToMe preset .* known presets: grid, half"):
        load_preset(name)


def test_a_preset_that_says_nothing_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("# ratio: 0.5\n")
    with pytest.raises(InputError, match=r"mine\.yaml has no key, so it would change nothing"):
        load_preset(tmp_path / "mine.yaml", may_be_path=True)


def test_every_shipped_preset_is_valid():
    for name in config_module.preset_names():
        assert ToMeConfig.from_mapping(load_preset(name)) != ToMeConfig()


def test_token_merging_of_a_model_stands_in_its_place():
    unet = {"params": {"tome_config": {"ratio": 0.5}}}
    config = {"model": {"params": {"unet_config": unet}}}
    assert model_tome(config, {"window": 5}).ratio == 0.5
    assert model_tome(config, False) == ToMeConfig()
    assert model_tome({"model": {"params": {"unet_config": {"params": {}}}}}, None).is_off
    wrong = {"model": {"params": {"unet_config": {"params": {}, "tome_config": {"ratio": 0.5}}}}}
    with pytest.raises(InputError, match=r"model\.params\.unet_config\.tome_config.*its place is"):
        model_tome(wrong, None)


@pytest.mark.parametrize(
    ("asked", "is_idle"),
    [
        ({"method": "grid"}, True),
        (ToMeWish({"stride": [2, 2]}), True),
        (ToMeWish({"seed": 3}), True),
        ({"method": "grid", "ratio": 0.5}, False),
        ({"ratio": 0}, False),
        ({}, False),
        (False, False),
        (None, False),
    ],
)
def test_settings_without_an_amount_are_not_silent(asked, is_idle, caplog):
    config = {"model": {"params": {"unet_config": {"params": {}}}}}
    model_tome(config, asked)
    assert ("no amount is given" in caplog.text) == is_idle


def test_whatever_is_asked_in_python_comes_to_a_configuration():
    own = {"ratio": 0.5}
    config = {"model": {"params": {"unet_config": {"params": {"tome_config": own}}}}}
    preset = ToMeConfig.from_mapping(overlay(own, load_preset("todo")))
    narrow = ToMeConfig.from_mapping({**own, "window": 5})
    for asked, expected in [
        (None, ToMeConfig.from_mapping(own)),
        (False, ToMeConfig()),
        ("todo", preset),
        ({"window": 5}, narrow),
        (ToMeWish({"window": 5}), narrow),
        (ToMeWish(is_off=True), ToMeConfig()),
        (preset, preset),
    ]:
        assert model_tome(config, asked) == expected
    for asked, message in [("nope", "there is no ToMe preset 'nope'"), (True, "a mapping of keys")]:
        with pytest.raises(InputError, match=message):
            model_tome(config, asked)
