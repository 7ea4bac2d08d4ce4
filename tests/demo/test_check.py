import functools

import pytest
import torch

from ldm.checkpoint.load import load_model
from ldm.config import shipped
from ldm.demo import check as demo
from ldm.demo.classifier import load_classifier
from ldm.demo.objects import train_finder
from ldm.demo.quality import first_stage_quality, told_apart
from ldm.demo.samples import held_out_scenes


def test_what_is_absent_or_plain_is_not_named():
    (scene,) = held_out_scenes(1, ("sky", "stars"))
    named = demo.named_attributes(scene)
    assert named["sky"] == "stars"
    assert not {"none", "plain", "bare"} & set(named.values())


def test_distances_between_pictures():
    black, white = torch.full((1, 3, 32, 32), -1.0), torch.ones(1, 3, 32, 32)
    assert demo.nearest(black, torch.cat([black, white])).tolist() == [0]
    assert demo.nearest(black, white).tolist() == [pytest.approx(2)]
    assert demo.spread(torch.cat([black, black])) == 0
    assert demo.spread(torch.cat([black, white])) == pytest.approx(2)


def test_a_check_of_the_shipped_model(monkeypatch, tmp_path):
    few = functools.partial(demo.classifier_accuracy, n=32)
    monkeypatch.setattr(demo, "classifier_accuracy", few)
    monkeypatch.setattr(demo, "train_finder", functools.partial(train_finder, 2, 2))
    monkeypatch.setattr(demo, "told_apart", functools.partial(told_apart, n_steps=2))
    monkeypatch.setattr(demo, "first_stage_quality", functools.partial(first_stage_quality, n=8))
    model = load_model(shipped("models/demo"), dtype=torch.float32, device=torch.device("cpu"))
    only = ("place", "sea")
    few = {"n_controls": 1, "n_training": 4, "n_frechet": 5, "cache_dir": str(tmp_path)}
    report, pictures = demo.check(model, load_classifier(), 2, steps=2, only=only, **few)
    assert pictures.shape == (2, 3, 256, 256)
    assert report["only"] == only
    assert "place=sea" in report["attributes"]
    assert set(report["attention"]) == {*demo.BY_SIMILARITY, *demo.CONTROLS}
    assert all(result["mean"] > 10 for result in report["attention"].values())
    assert report["copies"]["closest_sample"] > 0
    assert report["classifier"]["renders"]["place"] > 0.5
    assert report["first_stage"]["psnr_db"] > 30
    assert set(report["objects"]) == {"samples", "renders"}
    against = report["against_renders"]
    assert against["n"] == 5
    assert 0 <= against["told_apart"] <= 1
    assert against["frechet_samples"] > against["frechet_renders"] > 0


def test_three_rows_of_the_same_captions():
    model = load_model(shipped("models/demo"), dtype=torch.float32, device=torch.device("cpu"))
    drawn = demo.rows(model, 128, 2, 2, 4.0)
    assert drawn.shape == (6, 3, 128, 128)
    renders, reconstructions, samples = drawn.split(2)
    assert (renders - reconstructions).square().mean() < 0.02
    assert (renders - samples).square().mean() > 0.02
