"""Scenes: what can be in one, how it is said, and that the picture shows it."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from ldm.demo.scenes import (
    ATTRIBUTES,
    VOCABULARY,
    Scene,
    all_scenes,
    attributes,
    caption,
    is_held_out,
    mirror,
    render,
    sample_scene,
)
from ldm.remarks import unknown_words

# what a caption must say for a reader to know each value; values left out are never said
SAID = {
    "place": {"mountains": "mountains", "hills": "hills", "desert": "desert", "sea": r"\bsea\b"},
    "time": {
        "noon": "noon|midday|middle of the day",
        "sunset": "sunset",
        "dawn": "dawn|sunrise|early morning",
        "night": "night",
        "overcast": "overcast",
    },
    "light_position": {
        "left": r"(sun|moon)( high| low)? (on|in|to) the left",
        "centre": r"(sun|moon)( high| low)? (on|in|to) the (centre|center|middle)",
        "right": r"(sun|moon)( high| low)? (on|in|to) the right",
    },
    "sky": {"clouds": "clouds|cloudy", "stars": "stars|starry"},
    "ground": {"snow": "snow"},
    "object": {
        "sailboat": "sailboat",
        "pines": "pine trees",
        "house": "red house",
        "cactuses": "cactuses",
    },
}


def draw(scene, seed=0, size=64):
    return render(scene, np.random.default_rng(seed), size)


@pytest.mark.parametrize("canonical", [True, False])
def test_a_caption_names_what_there_is_and_nothing_else(canonical):
    rng = np.random.default_rng(3)
    for scene in all_scenes():
        for _ in range(1 if canonical else 4):
            text = caption(scene, None if canonical else rng)
            for name, value in attributes(scene).items():
                for other, pattern in SAID[name].items():
                    assert bool(re.search(pattern, text)) == (other == value), (text, name, other)


def test_captions_use_the_vocabulary_and_all_of_it():
    rng = np.random.default_rng(4)
    captions = [caption(s, rng) for s in all_scenes() for _ in range(20)]
    assert not [word for text in captions for word in unknown_words(text, VOCABULARY)]
    assert set(re.findall(r"\w+", " ".join(captions))) == VOCABULARY


def test_canonical_caption():
    scene = Scene("hills", "sunset", "left", "clouds", "bare", "house")
    expected = "a red house on green hills at sunset, the sun low on the left, a few clouds"
    assert caption(scene) == expected


def test_unknown_words_are_named_once_in_lower_case():
    prompt = "A Dragon, a red house and 2 dragons; Dragon!"
    assert unknown_words(prompt, VOCABULARY) == ["dragon", "2", "dragons"]


def test_attributes_are_those_declared():
    assert list(attributes(Scene())) == list(ATTRIBUTES)
    for scene in all_scenes():
        assert all(value in ATTRIBUTES[name] for name, value in attributes(scene).items())


def test_combinations_make_sense():
    for scene in all_scenes():
        assert (scene.light_position == "none") == (scene.time == "overcast")
        assert scene.sky != "stars" or scene.time == "night"
        assert scene.object != "sailboat" or scene.place == "sea"
        assert scene.object != "cactuses" or scene.place == "desert"
        assert scene.ground == "bare" or scene.place in ("mountains", "hills")


def test_splits_are_disjoint_complete_and_closed_under_mirroring():
    train, held_out = set(all_scenes("train")), set(all_scenes("held_out"))
    assert not train & held_out
    assert train | held_out == set(all_scenes())
    assert 0.08 < len(held_out) / len(all_scenes()) < 0.16
    assert {mirror(s) for s in held_out} == held_out
    assert all(is_held_out(s) for s in held_out)


def test_training_keeps_most_combinations_of_every_pair_of_values():
    def pairs(scenes):
        items = (itertools.combinations(attributes(s).items(), 2) for s in scenes)
        return Counter(itertools.chain.from_iterable(items))

    possible, kept = pairs(all_scenes()), pairs(all_scenes("train"))
    assert min(kept[pair] / possible[pair] for pair in possible) >= 0.6


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_samples_belong_to_their_split_and_vary(split):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, split) for _ in range(300)]
    assert set(scenes) <= set(all_scenes(split))
    for name, values in ATTRIBUTES.items():
        assert {attributes(s)[name] for s in scenes} == set(values)


def test_a_picture_depends_on_scene_and_seed_alone():
    scene = Scene("mountains", "noon", "left", "clouds", "snow", "pines")
    np.testing.assert_array_equal(draw(scene), draw(scene))
    assert (draw(scene) != draw(scene, seed=1)).mean() > 0.5


@pytest.mark.parametrize("scene", all_scenes()[::29], ids=str)
def test_the_content_is_the_same_at_every_size(scene):
    small = draw(scene, size=64).astype(float)
    large = draw(scene, size=128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 4.0
    assert (
        np.abs(draw(scene, seed=1, size=64) - small).mean() > 6.0
    )  # what another picture differs by


@pytest.mark.parametrize("time", ["noon", "sunset", "dawn", "night"])
@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_the_light_is_where_the_scene_says(place, time):
    thirds = {"left": (0.0, 0.36), "centre": (0.38, 0.62), "right": (0.64, 1.0)}
    for position, (low, high) in thirds.items():
        scene = Scene(place, time, position)
        for seed in range(4):
            sky = draw(scene, seed, 96)[:45, :, :2].astype(float).sum(axis=2)  # not blue
            _, columns = np.nonzero(sky > sky.max() - 12.0)
            assert low < np.median(columns) / 96 < high, (position, seed)
            assert mirror(mirror(scene)) == scene


@pytest.mark.parametrize("time", ["noon", "sunset", "dawn", "night"])
def test_light_falls_off_over_the_whole_picture(time):
    for seed in range(4):
        picture = draw(Scene("desert", time, "left"), seed, 64).astype(float)
        for rows in (picture[:24], picture[40:]):  # the sky, the ground
            assert rows[:, :24].mean() > 1.15 * rows[:, -24:].mean()


def test_the_mirrored_scene_has_its_light_on_the_other_side():
    assert mirror(Scene(light_position="left")) == Scene(light_position="right")
    assert mirror(Scene(light_position="centre")) == Scene(light_position="centre")


def changed(scene, other, seed=0):
    """Share of pixels that differ clearly between two scenes of one seed."""
    difference = draw(scene, seed, 64).astype(int) - draw(other, seed, 64)
    return (np.abs(difference).max(axis=2) > 25).mean()


@pytest.mark.parametrize("scene", [s for s in all_scenes() if s.object != "none"][::13], ids=str)
def test_objects_are_clearly_visible(scene):
    bare = Scene(scene.place, scene.time, scene.light_position, scene.sky, scene.ground, "none")
    assert changed(scene, bare) > 0.015


def test_stars_clouds_and_snow_are_clearly_visible():
    night = Scene("sea", "night", "left")
    assert changed(Scene("sea", "night", "left", "stars"), night) > 0.01
    for time in ("noon", "sunset", "dawn", "night"):
        plain = Scene("sea", time, "left")
        assert changed(Scene("sea", time, "left", "clouds"), plain) > 0.03
        for place in ("hills", "mountains"):
            snow = Scene(place, time, "left", "plain", "snow")
            assert changed(snow, Scene(place, time, "left")) > 0.2
