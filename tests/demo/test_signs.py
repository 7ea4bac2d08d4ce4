"""The second subject: signs, their captions and pictures."""

import numpy as np
import pytest

from ldm.config import load_config
from ldm.demo.signs import (
    COLOURS,
    PATTERNS,
    PLACES,
    WORDS,
    RenderedSigns,
    Sign,
    SignCaptions,
    draw_sign,
    sign_of,
)


def test_an_item_is_a_picture_with_its_caption():
    data = RenderedSigns(3, size=32, seed=5)
    item = data[2]
    assert item["caption"] == sign_of(2, 5).caption
    assert item["scene"] == sign_of(2, 5).attributes
    assert (item["image"].shape, item["image"].dtype) == ((32, 32, 3), np.float32)
    assert -1 <= item["image"].min() < item["image"].max() <= 1
    np.testing.assert_array_equal(item["image"], data[2]["image"])
    assert (item["image"] != RenderedSigns(3, size=32, seed=6)[2]["image"]).any()
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sign_has_its_colours_and_its_word_at_its_place(pattern):
    sign = Sign("TEA", "red", ("white", "blue"), pattern, "at the bottom")
    assert sign.caption == f"the word TEA in red letters at the bottom, on white and blue {pattern}"
    picture = draw_sign(sign, np.random.default_rng(0), 64).astype(float)
    names = list(COLOURS)
    distances = [np.abs(picture - np.array(COLOURS[name])).sum(2) for name in names]
    nearest = np.array(names)[np.argmin(distances, axis=0)]
    assert {"red", "white", "blue"} <= set(nearest.flat)
    assert not (nearest[:32] == "red").any()
    assert (nearest[32:] == "red").mean() > 0.05


def test_a_caption_comes_with_the_attributes_it_names():
    data = SignCaptions(5, seed=3)
    for item in data:
        word, ink, first, second, pattern, place = item["scene"].values()
        caption = f"the word {word} in {ink} letters {place}, on {first} and {second} {pattern}"
        assert item["caption"] == caption
    with pytest.raises(IndexError):
        data[5]


def test_the_configuration_has_the_signs_attributes():
    config = load_config("configs/study/signs_text.yaml")
    colours = list(COLOURS)
    assert config["model"]["params"]["attributes"] == {
        "word": list(WORDS),
        "ink": colours,
        "first": colours,
        "second": colours,
        "pattern": list(PATTERNS),
        "place": list(PLACES),
    }
