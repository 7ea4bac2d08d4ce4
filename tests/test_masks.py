"""Masks as painting programs write them; each holds the same square."""

import logging

import numpy as np
import pytest
from PIL import Image

from ldm.errors import InputError
from ldm.images import as_mask, load_mask

SQUARE = np.zeros((32, 48), bool)
SQUARE[8:20, 12:30] = True


def grey(inside, outside, kind=np.uint8):
    return np.where(SQUARE, inside, outside).astype(kind)


def colour(inside, outside):
    return np.where(SQUARE[..., None], inside, outside).astype(np.uint8)


def with_alpha(pixels, is_visible):
    return np.dstack([pixels, np.where(is_visible, 255, 0).astype(np.uint8)])


PHOTO = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
UPPER = SQUARE & (np.arange(32) < 14)[:, None]


def two_colours(upper, lower, outside):
    return np.where(UPPER[..., None], upper, colour(lower, outside)).astype(np.uint8)


FILES = {
    "white on black": grey(255, 0),
    "grey, two values": grey(100, 0),
    "0 and 1": grey(1, 0),
    "16 bits": grey(65535, 0, np.uint16),
    "16 bits, 0 and 1": grey(1, 0, np.uint16),
    "one bit": Image.fromarray(SQUARE),
    "a palette": Image.fromarray(grey(255, 0)).convert("P"),
    "red on black": colour((255, 0, 0), (0, 0, 0)),
    "dark blue on black": colour((0, 0, 150), (0, 0, 0)),
    "green on white": colour((0, 200, 0), (255, 255, 255)),
    "blue on red": colour((0, 0, 255), (255, 0, 0)),
    "white on blue": colour((255, 255, 255), (0, 0, 255)),
    "yellow and dark blue on black": two_colours((255, 255, 0), (0, 0, 90), (0, 0, 0)),
    "white and dark red on black": two_colours((255, 255, 255), (90, 0, 0), (0, 0, 0)),
    "red and pink on white": two_colours((255, 0, 0), (255, 190, 190), (255, 255, 255)),
    "strokes, an alpha of 0 and 1": np.dstack([colour((255, 0, 0), (0, 0, 0)), grey(1, 0)]),
    "erased from a photo, an alpha of 0 and 1": np.dstack([PHOTO, grey(0, 1)]),
    "white strokes": with_alpha(colour((255, 255, 255), (0, 0, 0)), SQUARE),
    "black strokes": with_alpha(colour((0, 0, 0), (0, 0, 0)), SQUARE),
    "red strokes": with_alpha(colour((255, 0, 0), (255, 0, 0)), SQUARE),
    "strokes, grey and alpha": np.dstack([grey(90, 0), grey(255, 0)]),
    "erased from a photo": with_alpha(PHOTO, ~SQUARE),
    "erased from black": with_alpha(colour((0, 0, 0), (0, 0, 0)), ~SQUARE),
    "erased from white": with_alpha(colour((255,) * 3, (255,) * 3), ~SQUARE),
    "faint strokes": np.dstack([colour((255, 0, 0), (0, 0, 0)), grey(77, 0)]),
    "half erased from a photo": np.dstack([PHOTO, grey(150, 255)]),
    "white on black, all visible": with_alpha(colour((255,) * 3, (0,) * 3), SQUARE | True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mask_means_the_same_however_it_was_made(tmp_path, caplog, name):
    caplog.set_level(logging.INFO, "ldm")
    image = FILES[name]
    path = tmp_path / "m.png"
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    np.testing.assert_array_equal(load_mask(path), SQUARE)
    assert "14.1 % is painted" in caplog.text
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_strokes_in_several_colours_and_a_soft_edge(tmp_path):
    pixels = with_alpha(colour((255, 0, 0), (0, 0, 0)), SQUARE)
    pixels[8:12, 12:30, :3] = (0, 0, 255)
    pixels[7, 12:30] = (255, 0, 0, 60)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.png"), SQUARE)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_soft_edge_in_each_kind_of_numbers(tmp_path, kind):
    """Values up to 255, which in 16 and 32 bits is almost black."""
    pixels = grey(255, 0, kind)
    pixels[7, 12:30] = 60
    pixels[19, 12:30] = 200
    path = tmp_path / "m.tiff"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(load_mask(path), SQUARE)


def test_what_is_to_be_added_around_a_photo_is_painted(tmp_path):
    Image.fromarray(with_alpha(PHOTO, SQUARE)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.png"), ~SQUARE)


@pytest.mark.parametrize(
    ("pixels", "share", "much"),
    [
        (grey(0, 0), "0.0 %", "nothing"),
        (grey(255, 255), "100.0 %", "everything"),
        (with_alpha(PHOTO, SQUARE & False), "100.0 %", "everything"),
    ],
)
def test_all_or_nothing_is_a_warning(tmp_path, caplog, pixels, share, much):
    caplog.set_level(logging.INFO, "ldm")
    Image.fromarray(pixels).save(tmp_path / "m.png")
    load_mask(tmp_path / "m.png")
    assert f"{share} is painted" in caplog.text
    assert f"paints {much}" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_coloured_strokes_in_a_jpeg_keep_their_edges(tmp_path, quality):
    large = np.kron(SQUARE, np.ones((4, 4), bool))
    for ink, paper in (((255, 0, 0), (0, 0, 0)), ((255, 0, 0), (255, 255, 255))):
        pixels = np.where(large[..., None], ink, paper).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "m.jpg", quality=quality)
        assert (load_mask(tmp_path / "m.jpg") != large).mean() < 0.02


def test_noise_of_compression_is_no_mask(tmp_path):
    noise = np.random.default_rng(0).integers(0, 4, (32, 48), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "m.png")
    assert not load_mask(tmp_path / "m.png").any()


@pytest.mark.parametrize(
    "array",
    [
        SQUARE,
        SQUARE[..., None],
        grey(255, 0),
        grey(1, 0),
        grey(65535, 0, np.uint16),
        grey(1, 0, np.float32),
        grey(0.9, 0.1, np.float64),
        colour((255, 0, 0), (0, 0, 0)),
    ],
)
def test_arrays_are_masks_like_files(array):
    np.testing.assert_array_equal(as_mask(array), SQUARE)


def test_an_array_of_another_shape_is_no_mask():
    for shape in ((4,), (4, 4, 4), (1, 4, 4), (0, 4)):
        with pytest.raises(InputError, match="mask: must be"):
            as_mask(np.zeros(shape, np.uint8))
