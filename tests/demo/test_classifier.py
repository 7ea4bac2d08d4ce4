"""The attribute classifier: shapes, sizes, training, and the weights that are shipped."""

import pytest
import torch
from safetensors.torch import save_file

from ldm.config import shipped
from ldm.demo.classifier import (
    WEIGHTS,
    AttributeClassifier,
    disturb,
    export_classifier,
    load_classifier,
)
from ldm.demo.rendered import RenderedScenes
from ldm.demo.scenes import ATTRIBUTES
from ldm.errors import InputError


def pictures(n, **settings):
    data = RenderedScenes(n, flip=False, **settings)
    items = [data[i] for i in range(n)]
    return torch.stack([torch.from_numpy(i["image"]).movedim(-1, 0) for i in items]), items


def test_one_score_per_value_of_every_attribute():
    model = AttributeClassifier(widths=(4, 4), n_features=8, size=16).eval()
    x = torch.rand(2, 3, 16, 16)
    assert {k: tuple(v.shape) for k, v in model(x).items()} == {
        name: (2, len(values)) for name, values in ATTRIBUTES.items()
    }
    assert model.features(x).shape == (2, 8)
    for answer in model.predict_attributes(x):
        assert all(answer[name] in values for name, values in ATTRIBUTES.items())


def test_other_sizes_are_judged_like_the_size_of_training():
    model = AttributeClassifier(widths=(4, 4), size=16).eval()
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(
        model.features(x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
        model.features(x),
        atol=0.1,
        rtol=0.1,
    )


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    x, items = pictures(8, size=32)
    batch = {
        "image": x.movedim(1, -1),
        "scene": {name: [i["scene"][name] for i in items] for name in ATTRIBUTES},
    }
    model = AttributeClassifier(widths=(8, 8), size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.terms(batch, "train")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_disturbed_pictures_stay_close():
    torch.manual_seed(0)
    x, _ = pictures(4, size=32)
    difference = (disturb(x) - x).abs().mean(dim=(1, 2, 3))
    assert (difference > 0.005).all()
    assert (difference < 0.25).all()


def test_exported_weights_are_those_that_load(tmp_path):
    model = AttributeClassifier().eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    export_classifier(tmp_path / "last.ckpt", tmp_path / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    assert not loaded.training
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(loaded.features(x), model.features(x), atol=2e-3, rtol=2e-2)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors"):
        load_classifier(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"head.weight": torch.ones(2)}, "holds other weights than those of the classifier"),
        (b"hello", "is a text file"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_classifier_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(InputError, match=message):
        load_classifier(path)


def test_the_shipped_classifier_knows_scenes_it_has_not_seen():
    x, items = pictures(48, size=128, seed=99, split="held_out")
    answers = load_classifier().predict_attributes(x)
    for name in ATTRIBUTES:
        correct = sum(a[name] == i["scene"][name] for a, i in zip(answers, items, strict=True))
        assert correct >= 46, name
    assert shipped(WEIGHTS).stat().st_size < 2**20
