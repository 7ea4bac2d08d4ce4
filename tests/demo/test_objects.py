"""Where objects are, and how many."""

import numpy as np
import torch

from ldm.demo.objects import count_objects, count_parts, object_mask, train_finder
from ldm.demo.scenes import Scene


def test_a_mask_shows_the_object_alone():
    picture, mask = object_mask(Scene("hills", object="house"), (1,), 64)
    assert picture.shape == (3, 64, 64)
    assert mask.shape == (32, 32)
    assert 0.01 < mask.mean() < 0.3
    assert mask[:8].sum() == 0  # none in the sky
    assert object_mask(Scene("hills"), (1,), 64)[1].sum() == 0


def test_parts_that_touch_are_one_and_crumbs_are_none():
    mask = np.zeros((32, 32), dtype=bool)
    assert count_parts(mask) == 0
    mask[2:8, 2:8] = mask[20:30, 20:30] = True
    assert count_parts(mask) == 2
    mask[8:20, 8:20] = np.eye(12, dtype=bool)  # from corner to corner
    assert count_parts(mask) == 1
    mask[0, 31] = True
    assert count_parts(mask) == 1


def test_a_finder_learns():
    random = torch.get_rng_state()
    finder = train_finder(12, 4)
    assert torch.equal(torch.get_rng_state(), random)
    picture, mask = object_mask(Scene("desert", object="cactuses"), (3,))
    scores = finder(picture[None])[0]
    assert scores[mask > 0].mean() > scores[mask == 0].mean()
    assert len(count_objects(finder, torch.zeros(2, 3, 256, 256))) == 2
