import pytest

from ldm.addons import find_addons, offered
from ldm.config import shipped
from ldm.errors import InputError
from ldm.web.models import find_models


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a.ckpt",
        "sub/b.SAFETENSORS",
        "lora/ink.safetensors",
        "embeddings/cat.pt",
        "vae/v.pt",
    ):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "models"


@pytest.mark.parametrize("ckpt", ["models/sub/b.SAFETENSORS", "models/a.ckpt", "other.ckpt"])
def test_the_checkpoint_that_was_given_comes_first(folder, ckpt):
    models = find_models(ckpt)
    assert next(iter(models.values())).resolve() == (folder.parent / ckpt).resolve()
    resolved = [path.resolve() for path in models.values()]
    assert len(resolved) == len(set(resolved))
    assert {"a.ckpt", "sub/b.SAFETENSORS"} <= set(models)


def test_without_one_it_is_the_demo_or_upstreams_default(folder):
    assert next(iter(find_models().values())) == shipped("models/demo")
    default = folder / "ldm" / "stable-diffusion-v1" / "model.ckpt"
    default.parent.mkdir(parents=True)
    default.touch()
    models = find_models()
    assert next(iter(models)) == "ldm/stable-diffusion-v1/model.ckpt"
    assert shipped("models/demo") in models.values()


def test_the_given_demo_stays_first_by_any_spelling(folder):
    models = find_models(str(shipped("models/demo") / "."))
    assert next(iter(models)) == "demo"


def test_files_of_one_name_are_told_apart(folder, tmp_path):
    other = tmp_path / "a.ckpt"
    other.touch()
    models = find_models(str(other))
    assert models["a.ckpt"] == other
    assert models[str(folder / "a.ckpt")] == folder / "a.ckpt"


def test_addons_are_no_checkpoints(folder):
    assert not [name for name in find_models() if "ink" in name or "cat" in name]
    assert list(find_addons("lora")) == ["ink"]
    assert find_addons("embeddings")["cat"].name == "cat.pt"
    assert find_addons("controlnet") == {}
    (folder / "a.vae.pt").touch()
    assert "a.vae.pt" not in find_models()
    assert offered("vae", "v").name == "v.pt"
    for name in ("../a", "/etc/passwd", "a", None, ["v"]):
        with pytest.raises(InputError, match="not in models/vae"):
            offered("vae", name)
