"""Who decides between eps and v, and how it is said."""

import pytest
import torch
import yaml
from safetensors import safe_open

from ldm.checkpoint.convert import convert
from ldm.checkpoint.load import inspect_checkpoint, load_model
from ldm.checkpoint.prediction import prediction_in_metadata, prediction_in_name
from ldm.config import load_config
from ldm.errors import InputError
from tests.golden_util import load_golden_keys
from tests.tiny_models import tiny_config, tiny_weights, write_header, write_safetensors

MARKERS = ("v_pred", "ztsnr")
BIAS = {"model.diffusion_model.out.2.bias": (4,)}


def model(path, family="sd1", markers=(), **metadata):
    """A file with the names and shapes of a published model, and others beside them."""
    shapes = {**load_golden_keys(family), **dict.fromkeys(markers, (0,))}
    return write_header(path, shapes, **dotted(metadata))


def dotted(metadata):
    return {name.replace("__", "."): value for name, value in metadata.items()}


def stored(path):
    with safe_open(path, framework="pt") as file:
        return list(file.keys()), file.metadata()


@pytest.mark.parametrize(
    ("stem", "prediction"),
    [
        ("512-base-ema", "eps"),
        ("768-v-ema", "v"),
        ("v2-1_512-ema-pruned", "eps"),
        ("v2-1_768-ema-pruned", "v"),
        ("v2-1_768-nonema-pruned", "v"),
        ("sd_turbo", "eps"),
        ("my-model-vpred", "v"),
        ("model_v_prediction", "v"),
        ("model-eps", "eps"),
        ("illuminati-v1-1", None),
        ("model", None),
        ("x1768", None),
        ("768-base", None),
        ("vivid", None),
        ("style v 2", None),
        ("my_v", None),
        ("steps-768-mix", None),
        ("512", "eps"),
        ("v2-1_768-ema-pruned-fp16", "v"),
        ("V2-1_768-EMA-pruned.fp16", "v"),
        ("mix vPrediction zsnr", "v"),
        ("eps-vpred", None),
        ("improved", None),
        ("mixXL_vPred10Version", "v"),
        ("mixXL_epsilonPred11Version", "eps"),
        ("sd15Vpred", "v"),
        ("style v predator", None),
        ("preview", None),
    ],
)
def test_prediction_in_a_files_name(stem, prediction):
    assert prediction_in_name(stem) == prediction


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"prediction_type": "v_prediction"}, "v"),
        ({"parameterization": "eps"}, "eps"),
        ({"prediction_type": "sample"}, "x0"),
        ({"modelspec.predict_key": " V "}, "v"),
        ({"prediction_type": "vpred"}, "v"),
        ({"prediction_type": "eps_prediction"}, "eps"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "eps"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, None),
        ({"ss_v_parameterization": "True"}, "v"),
        ({"ss_v_parameterization": "False", "prediction_type": "v"}, "v"),
        ({"v_pred": "True"}, "v"),
        ({"format": "pt"}, None),
        ({}, None),
    ],
)
def test_prediction_in_metadata(metadata, prediction):
    assert prediction_in_metadata(metadata) == prediction


def test_metadata_that_say_something_else_are_not_passed_by(tmp_path):
    path = model(tmp_path / "m.safetensors", prediction_type="flow")
    with pytest.raises(InputError, match=r"'flow'.*give --parameterization"):
        inspect_checkpoint(path)
    assert inspect_checkpoint(path, parameterization="eps").prediction == "eps"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("name", "facts", "kind", "zero_snr", "source"),
    [
        ("m", {"modelspec__predict_key": "v"}, "v", False, "by its metadata"),
        ("m", {"modelspec__prediction_type": "epsilon"}, "eps", False, "by its metadata"),
        ("m", {"markers": ["v_pred"]}, "v", False, "by its keys"),
        ("m", {"markers": MARKERS}, "v", True, "by its keys"),
        ("m", {"modelspec__predict_key": "v", "markers": ["ztsnr"]}, "v", True, "by its metadata"),
        ("m", {"prediction_type": "v", "ztsnr": "true"}, "v", True, "by its metadata"),
        ("m-vpred", {}, "v", False, "by its name"),
        ("m v-pred ztsnr", {}, "v", True, "by its name"),
        ("m-vpred", {"prediction_type": "epsilon"}, "eps", False, "by its metadata"),
        ("m", {"ss_v_parameterization": "true", "ztsnr": "yes"}, "v", True, "by its metadata"),
        ("m", {"markers": ["module.v_pred", "module.ztsnr"]}, "v", True, "by its keys"),
        ("mVPred_zeroSnr", {}, "v", True, "by its name"),
        ("m", {"v_pred": "true", "ztsnr": "true"}, "v", True, "by its metadata"),
    ],
)
def test_loading_and_converting_decide_alike(tmp_path, family, name, facts, kind, zero_snr, source):
    """What is found in a file is written into the next one, and found there again."""
    path = model(tmp_path / f"{name}.safetensors", family, **facts)
    info = inspect_checkpoint(path)
    assert (info.prediction, info.zero_snr, info.prediction_source) == (kind, zero_snr, source)
    params = info.config["model"]["params"]
    assert (params["parameterization"], params.get("zero_snr", False)) == (kind, zero_snr)

    markers = dict.fromkeys(facts.get("markers", ()), (0,))
    write_header(path, BIAS | markers, **dotted({k: v for k, v in facts.items() if k != "markers"}))
    _, written = stored(convert(path, tmp_path / "other.safetensors"))
    assert written["modelspec.prediction_type"] == {"v": "v", "eps": "epsilon"}[kind]
    assert (written.get("ztsnr") == "true") == zero_snr
    again = inspect_checkpoint(model(tmp_path / "again.safetensors", family, **written))
    assert (again.prediction, again.zero_snr) == (kind, zero_snr)


def test_a_guess_is_said_and_never_written(tmp_path):
    path = model(tmp_path / "style v 2.safetensors")
    assert inspect_checkpoint(path).prediction_source == "by the configuration that fits"
    assert stored(convert(write_header(path, BIAS), tmp_path / "b.safetensors"))[1] == {
        "format": "pt"
    }
    with pytest.raises(InputError, match="nothing in it says which"):
        inspect_checkpoint(model(path, "sd2"))


def test_the_configuration_beside_a_file_is_recorded(tmp_path):
    whole = load_config("configs/stable-diffusion/v1-inference.yaml")
    whole["model"]["params"] |= {"parameterization": "v", "rescale_betas_zero_snr": True}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(whole))
    path = model(tmp_path / "m.safetensors")
    info = inspect_checkpoint(path)
    assert (info.prediction, info.zero_snr) == ("v", True)
    assert info.prediction_source == f"by its configuration {tmp_path / 'm.yaml'}"
    _, written = stored(convert(write_header(path, BIAS), tmp_path / "b.safetensors"))
    assert written["modelspec.prediction_type"] == "v"


def test_the_configuration_of_a_link_is_that_of_its_file(tmp_path):
    """Also with the other ending; one beside the link itself comes first."""
    whole = load_config("configs/stable-diffusion/v1-inference.yaml")
    whole["model"]["params"]["parameterization"] = "v"
    (tmp_path / "m.yml").write_text(yaml.safe_dump(whole))
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "model.safetensors"
    link.symlink_to(model(tmp_path / "m.safetensors"))
    assert inspect_checkpoint(link).prediction == "v"
    whole["model"]["params"]["parameterization"] = "eps"
    link.with_suffix(".yaml").write_text(yaml.safe_dump(whole))
    assert inspect_checkpoint(link).prediction == "eps"


def test_a_link_has_the_name_of_its_file(tmp_path):
    """Upstream's README puts a link at the default path."""
    for name, family in (("my-vpred_ztsnr", "sd1"), ("v2-1_768-ema-pruned", "sd2")):
        link = tmp_path / f"{family}.safetensors"
        link.symlink_to(model(tmp_path / f"{name}.safetensors", family))
        info = inspect_checkpoint(link)
        assert (info.prediction, info.zero_snr) == ("v", family == "sd1")


@pytest.mark.parametrize("name", ["768", "768-v-ema", "v2-1_768-ema-pruned"])
def test_names_of_published_files_are_those_of_their_family(tmp_path, name):
    assert inspect_checkpoint(model(tmp_path / f"{name}.safetensors")).prediction == "eps"
    assert inspect_checkpoint(model(tmp_path / f"{name}.safetensors", "sd2")).prediction == "v"


@pytest.mark.parametrize(
    ("said", "kind"), [("v_prediction", "v"), ("V", "v"), ("epsilon", "eps"), ("sample", "x0")]
)
def test_a_configuration_may_say_it_in_other_words(tmp_path, said, kind):
    whole = load_config("configs/stable-diffusion/v1-inference.yaml")
    whole["model"]["params"]["parameterization"] = said
    path = model(tmp_path / "m.safetensors")
    assert inspect_checkpoint(path, whole).prediction == kind
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(whole))
    assert inspect_checkpoint(path).config["model"]["params"]["parameterization"] == kind
    convert(write_header(path, BIAS), tmp_path / "b.safetensors")
    assert (
        inspect_checkpoint(
            model(tmp_path / "b.safetensors", **stored(tmp_path / "b.safetensors")[1])
        ).prediction
        == kind
    )


@pytest.mark.parametrize("key", ["zero_snr", "rescale_betas_zero_snr"])
@pytest.mark.parametrize("value", [1, "true", "yes"])
def test_a_configuration_says_yes_or_no_to_zero_terminal_snr(tmp_path, key, value):
    whole = load_config("configs/stable-diffusion/v1-inference.yaml")
    whole["model"]["params"] |= {"parameterization": "v", key: value}
    path = model(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=f"{key} .*allowed is true or false"):
        inspect_checkpoint(path, whole)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(InputError, match=f"{key} .*allowed is true or false"):
        inspect_checkpoint(path)


def test_the_first_in_the_order_holds_and_a_contradiction_is_said(tmp_path, caplog):
    path = tmp_path / "m-vpred.safetensors"
    model(path, markers=["v_pred"], modelspec__prediction_type="epsilon")
    assert inspect_checkpoint(path).prediction == "eps"
    assert "its metadata say eps-prediction, its keys v" in caplog.text


def test_a_configuration_that_says_nothing_does_not_contradict(tmp_path, caplog):
    """Upstream's file has no such key, which means eps where nothing else is said."""
    whole = load_config("configs/stable-diffusion/v2-inference.yaml")
    whole["model"]["params"].pop("parameterization", None)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(whole))
    assert inspect_checkpoint(model(tmp_path / "m.safetensors", "sd2")).prediction == "eps"
    path = model(tmp_path / "m.safetensors", "sd2", markers=["v_pred"])
    assert inspect_checkpoint(path).prediction == "v"
    (tmp_path / "m.yaml").rename(tmp_path / "m-vpred.yaml")
    assert inspect_checkpoint(model(tmp_path / "m-vpred.safetensors", "sd2")).prediction == "v"
    assert not caplog.records


def test_the_schedule_of_a_file_with_zero_terminal_snr_ends_in_noise_alone(tmp_path, caplog):
    config = tiny_config()
    weights = tiny_weights(config) | dict.fromkeys(MARKERS, torch.zeros(0))
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    info = inspect_checkpoint(path)
    loaded = load_model(path, info=info)
    assert (loaded.parameterization, loaded.alphas_cumprod[-1].item()) == ("v", 0)
    assert "zero terminal SNR" in info.summary()
    assert not caplog.records


def test_zero_terminal_snr_without_v_is_left_out_with_a_line(tmp_path, caplog):
    info = inspect_checkpoint(model(tmp_path / "m.safetensors", markers=["ztsnr"]))
    assert (info.prediction, info.zero_snr) == ("eps", False)
    assert "needs v-prediction" in caplog.text


def test_what_was_asked_for_replaces_what_the_file_said(tmp_path):
    path = tmp_path / "m.safetensors"
    write_header(path, BIAS | dict.fromkeys(MARKERS, (0,)), prediction_type="v", ztsnr="true")
    assert stored(convert(path, tmp_path / "b.safetensors", parameterization="eps")) == (
        list(BIAS),
        {"format": "pt", "modelspec.prediction_type": "epsilon"},
    )
