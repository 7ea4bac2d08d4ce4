import contextlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.errors import InputError
from ldm.images import Gallery, Picture
from ldm.numbered import Numbers
from ldm.web_ui import web_ui_text


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- reading ----------------------------------------------------------------------------------


def test_any_mode_is_read_as_rgb(tmp_path):
    rgb = Image.fromarray(noise(6, 4))
    for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"):
        suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
        path = tmp_path / f"{mode}.{suffix}"
        rgb.convert(mode).save(path)
        pixels = images.load_rgb(path)
        assert pixels.shape == (6, 4, 3)
        assert pixels.dtype == np.uint8


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, 1, 3] = 255  # transparent, opaque and half transparent black
    rgba[0, 2, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "x.png")
    assert images.load_rgb(tmp_path / "x.png")[0, :, 0].tolist() == [255, 0, 127]


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(shades).save(tmp_path / "x.png")
    assert images.load_rgb(tmp_path / "x.png")[0, :, 0].tolist() == [0, 100, 255]


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path):
    image = Image.fromarray(noise(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "x.png"), np.rot90(noise(6, 4), -1))


def test_a_mask_is_true_where_it_is_white(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    assert images.load_mask(tmp_path / "m.png").tolist() == [[False, False, True, True]]


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing\.png: there is no such file"):
        images.load_rgb(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.png: not a picture"):
        images.load_rgb(tmp_path / "text.png")
    with pytest.raises(InputError, match="not a picture"):
        images.load_rgb(tmp_path)
    images.save_image(noise(64, 64), tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.png: not a picture"):
        images.load_rgb(tmp_path / "cut.png")


# --- sizes and values -------------------------------------------------------------------------


def test_fit_crops_the_middle_and_does_not_squash():
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 255  # the middle third
    np.testing.assert_array_equal(images.fit(picture, 8, 8), 255)
    mask = picture[..., 0] > 0
    assert images.fit_mask(mask, 8, 8).dtype == bool
    assert images.fit_mask(mask, 8, 8).all()


@pytest.mark.parametrize(
    ("shape", "wanted", "expected"),
    [
        ((3000, 4000), (None, None), (288, 384)),  # a photograph: limited, its shape kept
        ((4000, 3000), (None, None), (384, 288)),
        ((100, 70), (None, None), (96, 72)),  # small enough: rounded only
        ((300, 400), (600, None), (600, 800)),
        ((300, 400), (None, 800), (600, 800)),
        ((300, 400), (64, 512), (64, 512)),
        ((1, 1000), (None, None), (8, 384)),
    ],
)
def test_size_for_keeps_the_shape(shape, wanted, expected):
    assert images.size_for(np.zeros((*shape, 3), np.uint8), *wanted, longest=384) == expected
    assert images.loses_sides(np.zeros((*shape, 3), np.uint8), *expected) == (None not in wanted)


def test_pixels_survive_the_way_to_the_model_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    unit = images.to_unit(pixels)
    assert unit.shape == (3, 16, 16)
    assert (unit.min(), unit.max()) == (-1, 1)
    np.testing.assert_array_equal(images.to_pixels(unit), pixels)
    batch = torch.from_numpy(unit)[None].repeat(2, 1, 1, 1)
    np.testing.assert_array_equal(images.to_pixels(batch)[1], pixels)


def test_values_are_rounded_and_clamped():
    values = np.array([-5, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 5], np.float32)
    pixels = images.to_pixels(np.broadcast_to(values, (3, 1, 6)))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 0, 255, 255]


def test_nan_is_no_colour():
    with pytest.raises(ArithmeticError, match="NaN"):
        images.to_pixels(np.full((3, 2, 2), np.nan, np.float32))


def test_grid_has_rows_and_margins():
    pictures = [np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)]
    grid = images.make_grid(pictures, n_columns=2)
    assert grid.shape == (2 * 2 + 3 * 2, 2 * 3 + 3 * 2, 3)
    assert (grid[2:4, 2:5] == 10).all()
    assert (grid[2:4, 7:10] == 20).all()
    assert (grid[6:8, 2:5] == 30).all()
    assert grid[6:8, 7:10].sum() == 0
    assert grid.sum() == 2 * 3 * 3 * (10 + 20 + 30)
    assert images.make_grid(pictures[:1], n_columns=4).shape == (6, 7, 3)


# --- files ------------------------------------------------------------------------------------


def test_numbers_go_on_above_the_highest(tmp_path):
    assert Numbers(tmp_path / "none", "{:05}.png").next == 0
    for name in ("00001.png", "00007.png", "grid-0003.png", "x.png", "00009.png.part", "123.jpg"):
        (tmp_path / name).touch()
    assert Numbers(tmp_path, "{:05}.png").next == 8
    assert Numbers(tmp_path, "grid-{:04}.png").next == 4
    (tmp_path / "123456.png").touch()
    assert Numbers(tmp_path, "{:05}.png").next == 123457


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.png"
    images.save_image(noise(4, 4), path)
    np.testing.assert_array_equal(images.load_rgb(path), noise(4, 4))

    def fail(self, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"x\.png cannot be written: No space left"):
        images.save_image(noise(4, 4) + 1, path)
    assert [file.name for file in path.parent.iterdir()] == ["x.png"]
    np.testing.assert_array_equal(images.load_rgb(path), noise(4, 4))


SETTINGS = {
    "prompt": "a house, ünïcode 日本",
    "negative_prompt": "blurry: very",
    "seed": 7,
    "steps": 20,
    "sampler": "dpm_solver",
    "scale": 7.5,
    "eta": 0.0,
    "H": 64,
    "W": 128,
    "model": {"name": "v1-5, pruned", "hash": "cc6cb27103"},
    "tome": {"method": "grid", "ratio": 0.5, "stride": (2, 2)},
}


def test_a_picture_remembers_how_it_was_made(tmp_path):
    Picture(noise(4, 4), SETTINGS).save(tmp_path / "x.png")
    assert images.read_settings(tmp_path / "x.png") == json.loads(json.dumps(SETTINGS))
    text = Image.open(tmp_path / "x.png").text["parameters"]
    assert text.splitlines() == [
        "a house, ünïcode 日本",
        "Negative prompt: blurry: very",
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 128x64, "
        'Model hash: cc6cb27103, Model: "v1-5, pruned", Token merging ratio: 0.5',
    ]


def test_the_schedule_is_named_as_the_web_uis_do():
    text = web_ui_text({**SETTINGS, "sampler": "euler_a", "schedule": "karras"})
    assert "Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5" in text
    text = web_ui_text({**SETTINGS, "sampler": "plms", "schedule": "uniform"})
    assert "Sampler: PLMS, CFG scale: 7.5" in text
    assert "Eta DDIM: 0.5" in web_ui_text({**SETTINGS, "sampler": "ddim", "eta": 0.5})


def test_the_second_pass_is_named_as_the_web_uis_do():
    second = {"hires_scale": 2.0, "hires_strength": 0.6, "hires_steps": None}
    tome = {"ratio": 0.25, "hires": {"ratio": 0.5}}
    made = {**SETTINGS, **second, "hires_upscaler": "latent", "tome": tome}
    text = web_ui_text(made)
    assert "Denoising strength: 0.6, Hires upscale: 2, Hires upscaler: Latent, Token" in text
    assert text.endswith("Token merging ratio: 0.25, Token merging ratio hr: 0.5")
    assert "Hires steps: 9, " in web_ui_text({**made, "hires_steps": 9})


def test_a_picture_is_no_file_of_another_format(tmp_path):
    picture = images.Picture(noise(8, 8), {})
    with pytest.raises(InputError, match=r"x\.jpg: pictures are always PNG files"):
        picture.save(tmp_path / "new" / "x.jpg")
    assert list(tmp_path.iterdir()) == []
    picture.save(tmp_path / "x.PNG")
    picture.save(tmp_path / "x v1.5")


def test_a_picture_can_keep_its_settings_to_itself(tmp_path):
    Picture(noise(4, 4), SETTINGS).save(tmp_path / "x.png", with_settings=False)
    assert Image.open(tmp_path / "x.png").info == {}
    with pytest.raises(InputError, match=r"x\.png: this picture does not say"):
        images.read_settings(tmp_path / "x.png")


def test_a_grid_has_room_for_the_largest_picture():
    grid = images.make_grid([noise(4, 6), noise(8, 2)], 2)
    assert grid.shape == (12, 18, 3)
    np.testing.assert_array_equal(grid[2:6, 2:8], noise(4, 6))
    np.testing.assert_array_equal(grid[2:10, 10:12], noise(8, 2))
    assert not grid[6:, :10].any()


def test_gallery_numbers_pictures_and_makes_a_grid(tmp_path):
    gallery = Gallery(tmp_path / "out", n_columns=2)
    assert not (tmp_path / "out").exists()
    for seed in range(3):
        gallery.add(Picture(noise(4, 4), {**SETTINGS, "seed": seed}))
    gallery.close()
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    samples = [f"out/samples/0000{i}.png" for i in range(3)]
    assert names == ["out/grid-0000.png", *samples]
    assert images.load_rgb(tmp_path / names[0]).shape == (14, 14, 3)
    assert images.read_settings(tmp_path / samples[2])["seed"] == 2
    assert images.read_settings(tmp_path / names[0])["seed"] == 0


def test_gallery_leaves_out_what_is_not_wanted(tmp_path):
    for wanted in ("samples", "grid"):
        gallery = Gallery(
            tmp_path / wanted, has_samples=wanted == "samples", has_grid=wanted == "grid"
        )
        gallery.add(Picture(noise(4, 4), SETTINGS))
        gallery.close()
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert names == ["grid/grid-0000.png", "samples/samples/00000.png"]


# --- labels -----------------------------------------------------------------------------------


def test_a_label_is_dark_text_below_an_untouched_picture():
    pixels = noise(40, 200)
    labelled = images.label(pixels, ["ratio 0.5", "a line much too wide for a picture this narrow"])
    np.testing.assert_array_equal(labelled[:40], pixels)
    text = labelled[40:].min(axis=2)
    assert labelled.shape[1] == 200
    assert np.median(text) == 255
    assert (text[:20] < 100).sum() > 20  # the first line
    assert (text[20:] < 100).sum() > (text[:20] < 100).sum()
    assert (text[:, -4:] == 255).all()  # the font shrank


def test_an_encoded_png_is_the_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(images.encode_png(noise(5, 7)))
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.png"), noise(5, 7))


# --- damaged and made up ------------------------------------------------------------------------


def png_with(chunk, data, tmp_path):
    """A PNG with another chunk after its header."""
    path = tmp_path / "x.png"
    images.save_image(noise(8, 8), path)
    whole = path.read_bytes()
    body = chunk + data
    piece = struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(whole[:33] + piece + whole[33:])
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"Exif\0\0garbage",
        b"MM\0\x2a\0\0\xff\xff",
        b"II\x2a\0\x08\0\0\0\xff\xff",
        b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01",
        b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0",
    ],
)
def test_damaged_exif_is_refused(tmp_path, data):
    with pytest.raises(InputError, match=r"x\.png: not a picture that can be read"):
        images.load_rgb(png_with(b"eXIf", data, tmp_path))


def test_a_program_under_another_name_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(InputError, match=r"x\.png: not a picture .*its content is none of PNG"):
        images.load_rgb(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["avif", "webp", "jpg", "png", "gif", "tif", "bmp", "jp2"])
def test_damaged_files_are_refused_or_read_whole(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(40, 40)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for i in range(12):
        data = bytearray(whole[: len(whole) * (i + 1) // 13] if i % 2 else whole)
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            assert images.load_rgb(path).ndim == 3


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InputError, match="it is a pipe or a device"):
        images.load_rgb(tmp_path / "x.png")
    with pytest.raises(InputError, match="it is a folder"):
        images.load_rgb(tmp_path)


def test_sixteen_bits_with_a_transparent_shade_keep_their_shades(tmp_path):
    shades = np.array([[257 * 200, 257 * 100, 65535, 0]], np.uint16)
    Image.fromarray(shades).save(tmp_path / "x.png", transparency=257 * 100)
    assert images.load_rgb(tmp_path / "x.png")[0, :, 0].tolist() == [200, 255, 255, 0]


# --- several programs in one folder -------------------------------------------------------------


def test_programs_that_share_a_folder_lose_nothing(tmp_path):
    galleries = [Gallery(tmp_path, n_columns=2) for _ in range(4)]
    for number in range(3):
        for shade, gallery in enumerate(galleries):
            gallery.add(Picture(np.full((2, 2, 3), 10 * shade + number, np.uint8), SETTINGS))
    for gallery in galleries:
        gallery.close()
    found = [images.load_rgb(path)[0, 0, 0] for path in sorted((tmp_path / "samples").iterdir())]
    assert sorted(found) == sorted(10 * shade + number for shade in range(4) for number in range(3))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"grid-000{i}.png" for i in range(4)
    ]


def test_processes_that_share_a_run_have_their_places(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00004.png").touch()
    first, second = Gallery(tmp_path, has_grid=False), Gallery(tmp_path, has_grid=False)
    first.expect([0, 2])
    second.expect([1, 3])
    picture = Picture(noise(2, 2), SETTINGS)
    names = [gallery.add(picture).name for gallery in (second, second, first, first)]
    assert names == ["00006.png", "00008.png", "00005.png", "00007.png"]


def test_there_is_no_grid_of_more_than_a_hundred_pictures(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    gallery = Gallery(tmp_path, has_samples=False)
    for _ in range(101):
        gallery.add(Picture(noise(2, 2), SETTINGS))
    gallery.close()
    assert list(tmp_path.iterdir()) == []
    assert "There is no grid of more than 100 pictures" in caplog.text
