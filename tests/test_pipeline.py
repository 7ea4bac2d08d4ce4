import copy
import hashlib
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import images
from ldm.canvas import PictureNoise
from ldm.errors import InputError, OutOfMemory
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.controlnet import ControlNet
from ldm.pipeline import Pipeline
from ldm.remarks import unknown_words
from ldm.sampling import Texts
from ldm.settings import SAMPLERS, Settings
from ldm.web_ui import web_ui_text
from tests.golden_util import fill_parameters
from tests.tiny_models import tiny_config, write_safetensors


@pytest.fixture
def pipeline(tiny_checkpoint):
    return Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def inpainting(tiny_inpainting_checkpoint):
    return Pipeline.from_checkpoint(tiny_inpainting_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def photograph():
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def pixels(pictures):
    return np.stack([picture.pixels for picture in pictures])


def calls_of(pipeline, seen=lambda x, *_: len(x)):
    """Record what is seen of each call of the network: by default the batch's size."""
    noted, apply_model = [], pipeline.model.apply_model

    def recorded(*call):
        noted.append(seen(*call))
        return apply_model(*call)

    pipeline.model.apply_model = recorded
    return noted


def first_half(x, *_):
    return x[: len(x) // 2].clone()


def context_length(x, t, context):
    return context.shape[1]


def drawn_in_threads(streams):
    """What streams of pictures give, each read in a thread of its own."""
    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(list, streams))


# --- text to picture --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_picture_whatever_was_drawn_before(pipeline, sampler):
    first = pixels(pipeline.txt2img("a house", seed=3, sampler=sampler))
    assert first.shape == (1, 16, 16, 3)
    assert first.std() > 10
    other = pixels(pipeline.txt2img("hills", seed=4, sampler=sampler, n_samples=2))
    assert not np.array_equal(first[0], other[0])
    np.testing.assert_array_equal(
        pixels(pipeline.txt2img("a house", seed=3, sampler=sampler)), first
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_noise_of_a_picture_depends_on_its_own_seed_alone(pipeline, eta):
    together = pipeline.txt2img("a house", seed=5, n_samples=3, eta=eta, steps=3)
    one_by_one = pipeline.txt2img("a house", seed=5, n_iter=3, eta=eta, steps=3)
    alone = pipeline.txt2img("a house", seed=7, eta=eta, steps=3)
    assert [p.settings["seed"] for p in together] == [5, 6, 7]
    # other batch sizes may round differently, no more
    difference = pixels(together).astype(int) - pixels(one_by_one)
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(one_by_one[2].pixels, alone[0].pixels)
    assert np.abs(together[0].pixels.astype(int) - together[1].pixels).mean() > 10


def test_picture_noise_is_that_of_a_cpu_generator():
    noise = PictureNoise([1, 2])
    expected = torch.randn((4, 2, 2), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(noise((2, 4, 2, 2))[1], expected, rtol=0, atol=0)
    assert not torch.equal(noise((2, 4, 2, 2))[1], expected)  # the stream goes on
    torch.set_default_dtype(torch.bfloat16)  # which is for what has no type of its own
    try:
        with torch.device("meta"):
            noise = PictureNoise([2])
            assert torch.equal(noise((1, 4, 2, 2))[0], expected)
        assert torch.equal(PictureNoise([2])((1, 4, 2, 2))[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_picture_remembers_zero_terminal_snr(tiny_checkpoint):
    config = tiny_config(parameterization="v", zero_snr=True)
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint, config, device="cpu", dtype="float32")
    drawn = pipeline.txt2img("x", steps=2)[0]
    assert drawn.settings["model"]["zero_snr"] is True
    assert drawn.settings["model"]["parameterization"] == "v"


def test_upstream_s_noise_is_one_stream_from_the_seed(pipeline):
    starts = calls_of(pipeline, first_half)
    options = {"rng": "upstream", "seed": 9, "n_samples": 2, "n_iter": 2, "steps": 2}
    first = pixels(pipeline.txt2img("a house", **options))
    torch.manual_seed(9)
    torch.testing.assert_close(starts[0], torch.randn(2, 4, 8, 8), rtol=0, atol=0)
    for _ in range(2):  # DDIM draws at every step, even where it needs no noise
        torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(starts[2], torch.randn(2, 4, 8, 8), rtol=0, atol=0)
    torch.randn(5)
    np.testing.assert_array_equal(pixels(pipeline.txt2img("a house", **options)), first)


def test_fixed_code_starts_all_pictures_alike(pipeline):
    pictures = pipeline.txt2img("a house", n_samples=2, n_iter=2, fixed_code=True)
    assert np.ptp(pixels(pictures).astype(int), axis=0).max() <= 1


def test_upstream_s_fixed_code_starts_all_batches_alike(pipeline):
    options = {"n_samples": 2, "fixed_code": True, "rng": "upstream"}
    pictures = pixels(pipeline.txt2img(["a", "b", "a"], **options))
    assert np.abs(pictures[0].astype(int) - pictures[2]).max() <= 1  # the short batch included
    pictures = pixels(pipeline.txt2img("a", n_iter=2, **options))
    np.testing.assert_array_equal(pictures[:2], pictures[2:])
    assert not np.array_equal(pictures[0], pictures[1])


def test_several_prompts_and_a_short_last_batch(pipeline):
    sizes = calls_of(pipeline)
    pictures = pipeline.txt2img(["a", "b", "c"], n_samples=2, steps=1)
    assert [p.settings["prompt"] for p in pictures] == ["a", "b", "c"]
    assert sizes == [4, 2]  # with guidance, two rows a picture


def test_each_prompt_is_encoded_once_and_the_last_hundred_are_kept(pipeline, monkeypatch):
    encoder, encoded = pipeline.model.cond_stage_model, []
    encode = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda ids, *a: encoded.append(ids) or encode(ids, *a))
    pipeline.txt2img("a house", n_samples=2, n_iter=3, negative_prompt="blurry")
    assert len(encoded) == 2
    texts = Texts(pipeline.model, Settings("x"))
    words = [str(i) for i in range(150)]
    for _ in range(2):
        for word in words:
            texts([word])
    assert texts._kept.cache_info().currsize == 100


def test_scale_1_needs_no_second_pass(pipeline, caplog):
    sizes = calls_of(pipeline)
    plain = pixels(pipeline.txt2img("a house", scale=1))
    assert set(sizes) == {1}
    assert not np.array_equal(plain, pixels(pipeline.txt2img("a house", scale=3)))
    assert "no effect" not in caplog.text
    pipeline.txt2img("a house", scale=1, negative_prompt="blurry")
    assert "negative prompt has no effect at scale 1" in caplog.text


def test_the_negative_prompt_and_the_prompt_matter(pipeline):
    one = pixels(pipeline.txt2img("a house", negative_prompt="blurry"))
    assert not np.array_equal(one, pixels(pipeline.txt2img("a house")))
    assert not np.array_equal(one, pixels(pipeline.txt2img("a tree", negative_prompt="blurry")))


def test_pictures_come_one_by_one(pipeline):
    sizes = calls_of(pipeline)
    stream = pipeline.generate(Settings("a house", n_iter=3, steps=1))
    next(stream)
    assert len(sizes) == 1
    assert len(list(stream)) == 2


def test_deep_features_can_be_reused(pipeline, tiny_checkpoint):
    options = {"steps": 6, "seed": 3}
    plain = pixels(pipeline.txt2img("a house", **options))
    np.testing.assert_array_equal(
        pixels(pipeline.txt2img("a house", reuse_deep=1, **options)), plain
    )
    reused = pixels(pipeline.txt2img("a house", reuse_deep=3, **options))
    assert not np.array_equal(reused, plain)
    np.testing.assert_array_equal(pixels(pipeline.txt2img("a house", **options)), plain)
    pipeline.set_tome({"ratio": 0.5})
    merged = pipeline.txt2img("a house", reuse_deep=3, **options)[0]
    assert not np.array_equal(merged.pixels, reused[0])
    assert merged.settings["reuse_deep"] == 3
    # in a configuration: for the network, or among the defaults
    config = yaml.safe_load(tiny_checkpoint.with_suffix(".yaml").read_text())
    for place in (config["model"]["params"]["unet_config"]["params"], config["defaults"]):
        place["reuse_deep"] = 3
        other = Pipeline.from_checkpoint(tiny_checkpoint, config, "cpu", "float32")
        np.testing.assert_array_equal(pixels(other.txt2img("a house", **options)), reused)
        del place["reuse_deep"]


@pytest.mark.parametrize(("height", "width"), [(8, 40), (24, 16), (56, 8)])
def test_any_multiple_of_8_is_a_size(pipeline, height, width):
    for tome in (None, {"ratio": 0.5}):
        pipeline.set_tome(tome)
        assert pixels(pipeline.txt2img("x", H=height, W=width)).shape == (1, height, width, 3)


# --- second pass ------------------------------------------------------------------------------


def test_a_second_pass_over_the_picture_is_img2img(pipeline):
    options = {"steps": 4, "seed": 5, "scale": 2}
    second = {"hires_scale": 2, "hires_strength": 0.5, "hires_upscaler": "lanczos"}
    first = pipeline.txt2img("a house", n_samples=2, **options)
    redrawn = pixels(pipeline.txt2img("a house", n_samples=2, **options, **second))
    for picture, result in zip(first, redrawn, strict=True):
        options["seed"] = picture.settings["seed"]
        large = images.fit(picture.pixels, 32, 32)
        (expected,) = pixels(
            pipeline.img2img(large, "a house", H=32, W=32, strength=0.5, **options)
        )
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_a_second_pass_over_the_latents_starts_from_them(pipeline):
    options = {"steps": 4, "seed": 5, "scale": 2}
    first = pixels(pipeline.txt2img("a house", **options))
    distances = []
    for strength in (0.0, 0.5, 1.0):
        options |= {"hires_scale": 2, "hires_strength": strength}
        (second,) = pixels(pipeline.txt2img("a house", **options))
        assert second.shape == (32, 32, 3)
        distances.append(np.abs(images.fit(first[0], 32, 32).astype(int) - second).mean())
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])
def test_the_second_pass_does_not_depend_on_the_batch(pipeline, sampler):
    options = {"sampler": sampler, "schedule": "karras", "hires_scale": 1.5, "seed": 5, "steps": 3}
    together = pixels(pipeline.txt2img("a house", n_samples=2, **options))
    options["seed"] = 6
    alone = pixels(pipeline.txt2img("a house", **options))
    assert together.shape == (2, 24, 24, 3)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1


def test_the_second_pass_takes_its_share_of_its_own_steps(pipeline):
    sizes = calls_of(pipeline)
    pipeline.txt2img("x", steps=4, hires_scale=2, hires_steps=10, hires_strength=0.6)
    assert len(sizes) == 4 + 6


def test_each_pass_merges_and_reports_for_itself(pipeline, caplog):
    caplog.set_level("INFO", "ldm")
    pipeline.set_tome({"ratio": 0.25, "hires": {"ratio": 0.5}})
    own = pipeline.model.model.diffusion_model.tome.config
    picture = pipeline.txt2img("x", hires_scale=2)[0]
    lines = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert len(lines) == 2
    assert "64 -> 48 tokens" in lines[0]
    assert "256 -> 128 tokens" in lines[1]
    assert lines[1].startswith("ToMe: second pass: grid 2x2 ratio=0.5")
    assert pipeline.model.model.diffusion_model.tome.config == own
    assert picture.settings["tome"]["hires"]["ratio"] == 0.5
    json.dumps(picture.settings)
    caplog.clear()
    pipeline.txt2img("x")
    assert "ToMe hires has no effect without a second pass" in caplog.text
    assert "ToMe: second pass" not in caplog.text


def test_upstream_s_noise_is_the_same_with_a_second_pass_to_come(pipeline):
    starts = calls_of(pipeline, first_half)
    pipeline.txt2img("x", rng="upstream", seed=3, steps=2, fixed_code=True, hires_scale=2)
    torch.manual_seed(3)
    assert torch.equal(starts[0], torch.randn(1, 4, 8, 8))
    assert [start.shape[-1] for start in starts] == [8, 8, 16]


def test_a_picture_to_start_from_has_no_second_pass(pipeline, photograph):
    with pytest.raises(InputError, match="hires_scale 2 is for txt2img"):
        pipeline.img2img(photograph, "x", hires_scale=2)


# --- from a picture ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rng", ["image", "upstream"])
def test_img2img_stays_the_closer_the_smaller_the_strength(pipeline, photograph, sampler, rng):
    options = {"sampler": sampler, "rng": rng, "steps": 4, "scale": 1, "n_samples": 2}
    kept = pixels(pipeline.img2img(photograph, "x", strength=0, **options))
    assert kept.shape == (2, 16, 24, 3)
    distances = []
    for strength in (0.1, 0.5, 0.75):
        redrawn = pixels(pipeline.img2img(photograph, "x", strength=strength, **options))
        distances.append(np.abs(redrawn.astype(int) - kept).mean())
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img_at_strength_1_ignores_the_picture(pipeline, photograph, sampler):
    options = {"sampler": sampler, "strength": 1.0, "steps": 3, "n_samples": 2, "seed": 3}
    one = pixels(pipeline.img2img(photograph, "x", **options))
    np.testing.assert_array_equal(one, pixels(pipeline.img2img(255 - photograph, "x", **options)))
    del options["strength"]
    np.testing.assert_array_equal(one, pixels(pipeline.txt2img("x", H=16, W=24, **options)))


def test_img2img_draws_upstream_s_noise_in_upstream_s_order(pipeline, photograph):
    options = {"rng": "upstream", "seed": 9, "n_samples": 2, "steps": 4, "strength": 0.5}
    pictures = pixels(pipeline.img2img(photograph, ["x", "x", "x"], scale=2, eta=1.0, **options))
    model, sampler = pipeline.model, DDIMSampler(pipeline.model)
    sampler.make_schedule(4, ddim_eta=1.0)
    picture = torch.from_numpy(images.to_unit(photograph))[None]
    torch.manual_seed(9)
    posterior = model.encode_first_stage(picture.expand(2, -1, -1, -1))
    latents = model.get_first_stage_encoding(posterior)  # drawn once, on the CPU
    for start, n in ((0, 2), (2, 1)):
        noisy = sampler.stochastic_encode(latents[:n], 2)
        text, empty = (model.get_learned_conditioning([t] * n) for t in ("x", ""))
        drawn = model.decode_first_stage(sampler.decode(noisy, text, 2, 2.0, empty, verbose=False))
        expected = images.to_pixels(drawn.detach())
        assert np.abs(pictures[start : start + n].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("strength", "calls"), [(0.0, 0), (0.05, 1), (0.5, 5), (0.75, 7), (0.99, 9), (1.0, 10)]
)
def test_strength_is_a_share_of_the_steps(pipeline, photograph, strength, calls):
    sizes = calls_of(pipeline)
    pipeline.img2img(photograph, "x", strength=strength, steps=10)
    assert len(sizes) == calls


def test_a_huge_photograph_is_made_smaller_and_says_so(pipeline, caplog):
    caplog.set_level("INFO", "ldm")
    huge = np.zeros((300, 400, 3), np.uint8)
    assert pipeline.img2img(huge, "x")[0].pixels.shape == (16, 24, 3)  # 1.5 times the model's 16
    assert "picture of 400x300 is drawn at 24x16" in caplog.text
    assert pipeline.img2img(huge, "x", W=32)[0].pixels.shape == (24, 32, 3)
    assert "cut off" not in caplog.text
    assert pipeline.img2img(huge, "x", W=32, H=8)[0].pixels.shape == (8, 32, 3)
    assert "picture of 400x300 is drawn at 32x8, its sides cut off" in caplog.text


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["pipeline", "inpainting"])
def test_inpainting_paints_inside_of_the_mask_alone(kind, sampler, photograph, request):
    painter = request.getfixturevalue(kind)
    mask = np.zeros((16, 24), bool)
    mask[3:9, 5:14] = True
    painted = pixels(painter.inpaint(photograph, mask, "x", sampler=sampler, n_samples=2, steps=3))
    assert painted.shape == (2, 16, 24, 3)
    for picture in painted:
        np.testing.assert_array_equal(picture[~mask], photograph[~mask])
        assert np.abs(picture[mask].astype(int) - photograph[mask]).mean() > 10
    assert not np.array_equal(painted[0], painted[1])


def test_arrays_are_pictures_and_masks_of_the_right_kind_or_refused(pipeline, photograph):
    mask = np.zeros((16, 24), np.uint8)
    mask[3:9, 5:14] = 255
    (painted,) = pipeline.inpaint(photograph, mask, "x", steps=2)
    expected = pipeline.inpaint(photograph, mask > 0, "x", steps=2)[0].pixels
    np.testing.assert_array_equal(painted.pixels, expected)
    with pytest.raises(InputError, match="mask: it is 16x24, but the picture is 24x16"):
        pipeline.inpaint(photograph, mask.T, "x", steps=2)
    rgba = np.zeros((16, 24, 4), np.uint8)
    for wrong in (photograph / 255, photograph[..., 0], rgba, photograph[:0]):
        with pytest.raises(InputError, match=r"picture: must be uint8 of shape \(H, W, 3\), not"):
            pipeline.img2img(wrong, "x")


def test_a_picture_that_was_drawn_is_one_to_start_from(pipeline, photograph):
    (drawn,) = pipeline.img2img(photograph, "x", steps=2)
    (again,) = pipeline.img2img(drawn, "x", steps=2)
    (expected,) = pipeline.img2img(drawn.pixels, "x", steps=2)
    np.testing.assert_array_equal(again.pixels, expected.pixels)
    (painted,) = pipeline.inpaint(drawn, np.zeros((16, 24), bool), "x", steps=1)
    np.testing.assert_array_equal(painted.pixels, drawn.pixels)


def test_objects_that_are_no_pictures_are_refused_with_a_way_out(pipeline, photograph):
    other = Image.fromarray(photograph)
    with pytest.raises(
        InputError, match=r"^picture: must be .* not Image; numpy.asarray makes one"
    ):
        pipeline.img2img(other, "x")
    with pytest.raises(InputError, match=r"^mask: must be .* not Image; numpy.asarray makes one"):
        pipeline.inpaint(photograph, other, "x")


def test_a_mask_of_numbers_is_white_where_they_are_high(pipeline, photograph):
    mask = np.zeros((16, 24), bool)
    mask[3:9, 5:14] = True
    right = pipeline.inpaint(photograph, mask, "x", steps=1)[0].pixels
    for white, kind in ((255, np.uint8), (1, np.uint8), (1, np.float32), (65535, np.int32)):
        drawn = pipeline.inpaint(photograph, mask.astype(kind) * kind(white), "x", steps=1)
        np.testing.assert_array_equal(drawn[0].pixels, right)


def test_what_would_not_lie_where_it_is_meant_is_refused(pipeline, photograph, caplog):
    mask = np.ones((16, 24), bool)
    for wrong in (mask.T, mask[:, :16]):
        with pytest.raises(InputError, match="make them alike"):
            pipeline.inpaint(photograph, wrong, "x", steps=1)
    pipeline.inpaint(photograph, np.ones((32, 49), bool), "x", steps=1, strength=0.5)
    assert "strength has no effect inside of a mask" in caplog.text


@pytest.mark.parametrize("kind", ["pipeline", "inpainting"])
def test_inpainting_sees_what_surrounds_the_hole_but_not_what_is_in_it(kind, photograph, request):
    painter = request.getfixturevalue(kind)
    mask = np.zeros((16, 24), bool)
    mask[:, 8:16] = True
    painted = painter.inpaint(photograph, mask, "x", steps=3)[0].pixels[mask]
    inside, outside = photograph.copy(), photograph.copy()
    outside[:, :8] = 255 - outside[:, :8]
    assert not np.array_equal(painter.inpaint(outside, mask, "x", steps=3)[0].pixels[mask], painted)
    if kind == "inpainting":  # blending shows the rest of the picture through the first stage
        inside[mask] = 255 - inside[mask]
        hidden = painter.inpaint(inside, mask, "x", steps=3)[0].pixels[mask]
        np.testing.assert_array_equal(hidden, painted)


def test_an_inpainting_checkpoint_also_draws_whole_pictures(inpainting, photograph):
    assert pixels(inpainting.txt2img("x", n_samples=2)).shape == (2, 16, 16, 3)
    redrawn = inpainting.img2img(photograph, "x", strength=0.3, steps=10)
    assert redrawn[0].pixels.shape == (16, 24, 3)


def test_few_steps_leave_no_noise_in_the_picture(pipeline, photograph):
    """Where the predicted noise is right, a picture's latents come back as they were."""
    model, encode = pipeline.model, pipeline.model.get_first_stage_encoding
    known, drawn = [], []

    def remembered(posterior, *noise):
        known.append(encode(posterior, *noise))
        return known[-1]

    def right(x, t, c):
        a = torch.from_numpy(np.interp(t, np.arange(1000), model.alphas_cumprod)).float()
        a = a.reshape(-1, 1, 1, 1)
        return (x - a.sqrt() * known[-1].float()) / (1 - a).sqrt()

    def decoded(z):
        drawn.append(z)
        return torch.zeros(1, 3, 16, 24)

    model.get_first_stage_encoding, model.apply_model = remembered, right
    model.decode_first_stage = decoded
    left = {}
    for sampler in SAMPLERS:
        for rng in ("image", "upstream"):
            options = {"sampler": sampler, "steps": 10, "scale": 1, "rng": rng}
            pipeline.img2img(photograph, "x", strength=0.1, **options)
            left[sampler, rng] = (drawn[-1] - known[-1]).std().item()
    lowest = (1 - model.alphas_cumprod[0].item()) ** 0.5  # where some samplers end
    assert all(noise < 1.2 * lowest for (_, rng), noise in left.items() if rng == "image"), left
    assert left["ddim", "upstream"] > 5 * lowest  # as upstream has it


# --- what is said -----------------------------------------------------------------------------


def test_settings_survive_in_the_picture_and_reproduce_it(pipeline, tmp_path):
    picture = pipeline.txt2img("a house", seed=11, n_samples=2, sampler="plms", scale=4.0)[1]
    picture.save(tmp_path / "x.png")
    read = images.read_settings(tmp_path / "x.png")
    assert read == json.loads(json.dumps(picture.settings))
    assert read["model"]["name"] == "tiny"
    assert (read["dtype"], read["device"], read["rng"]) == ("float32", "cpu", "image")
    again = {name: read[name] for name in ("seed", "sampler", "scale", "steps", "H", "W", "eta")}
    redrawn = pipeline.txt2img(read["prompt"], **again)[0]
    assert np.abs(redrawn.pixels.astype(int) - picture.pixels).max() <= 1


def test_tome_is_reported_and_changes_the_picture(tiny_checkpoint, caplog):
    caplog.set_level("INFO", "ldm")
    options = {"device": "cpu", "dtype": "float32"}
    plain = Pipeline.from_checkpoint(tiny_checkpoint, **options)
    unmerged = pixels(plain.txt2img("a house"))
    assert "ToMe:" not in caplog.text
    merging = Pipeline.from_checkpoint(tiny_checkpoint, tome={"ratio": 0.5}, **options)
    picture = merging.txt2img("a house")[0]
    lines = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert sum(line.startswith("ToMe:") for line in lines) == 1
    assert "64 -> 32 tokens" in caplog.text
    assert picture.settings["tome"]["ratio"] == 0.5
    assert not np.array_equal(picture.pixels, unmerged[0])
    for off in ({"ratio": 0}, False, None):
        merging.set_tome(off)
        np.testing.assert_array_equal(pixels(merging.txt2img("a house")), unmerged)


def test_the_report_speaks_of_all_batches(tiny_checkpoint, caplog):
    caplog.set_level("INFO", "ldm")
    tome = {"method": "bipartite", "ratio": 0.5, "similarity": 0.8, "apply_to": ["kv"]}
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint, None, "cpu", "float32", tome)
    merger, kept = pipeline.model.model.diffusion_model.tome, []

    def observe(call, blocks):
        kept.append({block.n_kept for block in blocks if block.n_kept < block.n_tokens == 64})

    merger.observer = observe
    pipeline.txt2img("a house", seed=3, n_iter=3, steps=2)
    lines = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    [line] = [line for line in lines if line.startswith("ToMe:")]
    assert len(kept) == 6
    everywhere, last = set.union(*kept), set.union(*kept[-2:])
    assert f"64 -> {min(everywhere)}-{max(everywhere)} tokens" in line
    assert (min(everywhere), max(everywhere)) != (min(last), max(last))  # or it would prove nothing


def test_the_yaml_s_tome_config_counts_unless_it_is_overruled(tiny_checkpoint):
    config = yaml.safe_load(tiny_checkpoint.with_suffix(".yaml").read_text())
    unet = config["model"]["params"]["unet_config"]["params"]
    unet["tome_config"] = {"method": "bipartite", "ratio": 0.25, "protect": 1}

    def merging(tome):
        pipeline = Pipeline.from_checkpoint(tiny_checkpoint, config, "cpu", "float32", tome)
        return pipeline.model.model.diffusion_model.tome.config

    assert merging(None).ratio == 0.25
    assert (merging({"r": 8}).r, merging({"r": 8}).ratio, merging({"r": 8}).protect) == (8, None, 1)
    assert merging(False).is_off


def test_the_padding_can_be_dropped_from_the_context(tiny_checkpoint, pipeline, caplog):
    whole = pixels(pipeline.txt2img("a house", n_samples=2))
    pipeline.set_tome({"context": "trim"})
    lengths = calls_of(pipeline, context_length)
    with caplog.at_level("INFO", logger="ldm"):
        alone = pixels(pipeline.txt2img("a house", n_samples=1, n_iter=2))
        together = pixels(pipeline.txt2img("a house", n_samples=2))
    assert set(lengths) == {4}  # start, a, house, end
    assert "4 tokens of context are left" in caplog.text
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert not np.array_equal(together, whole)
    pipeline.txt2img("a house", negative_prompt="a red house")
    assert set(lengths) == {4, 5}


def test_a_merging_without_effect_is_a_warning(pipeline, caplog):
    pipeline.set_tome({"ratio": 0.5, "min_tokens": 100000})
    pipeline.txt2img("a house")
    assert "ToMe merged nothing" in caplog.text


def test_words_beyond_the_model_s_sight_are_named(pipeline, caplog):
    pipeline.txt2img("hill " * 75 + "a purple sheep", steps=1)
    assert "'a purple sheep'" in caplog.text
    caplog.clear()
    pipeline.txt2img("hill " * 75, steps=1)
    assert caplog.text == ""


def test_long_prompts_are_read_to_their_end(pipeline, caplog):
    start = " ".join(["tree"] * 80)
    contexts = calls_of(pipeline, context_length)
    options = {"long_prompt": True, "scale": 3}
    one = pixels(pipeline.txt2img(f"{start} house", **options))
    assert set(contexts) == {2 * 77}
    assert "too long" not in caplog.text
    assert not np.array_equal(one, pixels(pipeline.txt2img(f"{start} sea", **options)))
    # the batch does not matter, nor does another text's length in it
    texts = [f"{start} house", "a sea"]
    together = pixels(pipeline.txt2img(texts, n_samples=2, **options))
    apart = pixels(pipeline.txt2img(texts, n_samples=1, **options))
    assert np.abs(together.astype(int) - apart).max() <= 1
    # nor what other prompts a run has, of which --skip leaves some out
    alone = pixels(pipeline.txt2img("a sea", seed=43, **options))
    np.testing.assert_array_equal(alone[0], together[1])
    contexts.clear()
    pipeline.txt2img("a house", **options)
    pipeline.txt2img("a house", negative_prompt=start, **{**options, "scale": 1})
    assert set(contexts) == {77}
    pipeline.txt2img("a house", negative_prompt=f"{start} sea", **options)
    assert set(contexts) == {77, 2 * 77}


def test_emphasis_changes_the_picture_only_where_it_is_asked_for(pipeline):
    plain = pixels(pipeline.txt2img("a red house", steps=3))
    weighed = pixels(pipeline.txt2img("a (red:1.8) house", steps=3, emphasis=True))
    assert not np.array_equal(plain, weighed)
    same = pixels(pipeline.txt2img("a (red:1.0) house", steps=3, emphasis=True))
    np.testing.assert_array_equal(same, plain)


def test_the_web_uis_syntax_is_understood_or_named(pipeline, caplog):
    options = {"steps": 1, "scale": 1}
    with pytest.raises(InputError, match="lora 'style': not in models/lora"):
        pipeline.txt2img("a house<lora:style:0.8>", **options)
    pipeline.txt2img("a house", negative_prompt="<lora:style:0.8>", **{**options, "scale": 2})
    assert "'<lora:style:0.8>' in a prompt is read as words" in caplog.text
    for prompt, emphasis, said in [
        ("a (house:1.2)", False, "'(house:1.2)' in a prompt is read as words"),
        ("a ((house))", False, "--emphasis reads the web UIs' emphasis"),
        ("a BREAK house", False, "the web UIs' BREAK"),
        ("a BREAK house", True, "BREAK in a prompt does nothing without --long_prompt"),
        ("a [cat:dog:0.5]", True, "'[cat:dog:0.5]' in a prompt is read as words"),
        ("a [cat|dog]", True, "alternating words is not included"),
        ("a cat AND a dog", True, "'AND' in a prompt is read as words"),
        ("a (red) house, and sand: 5", False, ""),
        ("a (house:1.2)", True, ""),
    ]:
        caplog.clear()
        pipeline.txt2img(prompt, emphasis=emphasis, **options)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


def test_clip_skip_leaves_out_layers(pipeline):
    plain = pixels(pipeline.txt2img("a house"))
    picture = pipeline.txt2img("a house", clip_skip=2)[0]
    assert not np.array_equal(picture.pixels, plain[0])
    assert "Clip skip: 2" in web_ui_text(picture.settings)
    with pytest.raises(InputError, match="clip_skip 3: this model's text encoder takes 1 to 2"):
        pipeline.txt2img("a house", clip_skip=3)


def test_words_unknown_to_the_model_are_named(pipeline, caplog):
    pipeline.defaults["vocabulary"] = "ldm.demo.scenes.VOCABULARY"
    pipeline.txt2img("snow, a Robot and a robot's spaceship", steps=1)
    assert "words that this model has never seen: robot, s, spaceship" in caplog.text
    assert unknown_words("Hills, 2 hills!", {"hills"}) == ["2"]


# --- ControlNet -------------------------------------------------------------------------------


@pytest.fixture
def controlnet(tmp_path, pipeline):
    """A file of random weights for the tiny model, and a picture."""
    unet = pipeline.info.config["model"]["params"]["unet_config"]["params"]
    net = fill_parameters(ControlNet(**unet), seed=4)
    path = write_safetensors(
        tmp_path / "scribble.safetensors",
        {f"control_model.{name}": tensor for name, tensor in net.state_dict().items()},
    )
    picture = np.zeros((30, 30, 3), np.uint8)
    picture[8:20, 8:20] = 255
    return path, picture


def test_a_controlnet_guides_what_is_drawn(pipeline, tiny_checkpoint, controlnet):
    path, picture = controlnet
    options = {"steps": 3, "seed": 4, "n_samples": 2}
    plain = pixels(pipeline.txt2img("a house", **options))
    control = {"net": path, "picture": picture, "strength": 0.5}
    pipeline.set_control(**control)
    (guided, _) = pipeline.txt2img("a house", **options)
    assert not np.array_equal(guided.pixels, plain[0])
    (noted,) = guided.settings["controlnets"]
    assert (noted["name"], noted["strength"], noted["canny"]) == ("scribble", 0.5, False)
    at_once = Pipeline.from_checkpoint(
        tiny_checkpoint, device="cpu", dtype="float32", control=control
    )
    np.testing.assert_array_equal(at_once.txt2img("a house", **options)[0].pixels, guided.pixels)
    pipeline.set_control(path, 255 - picture, 0.5)
    inverted = pixels(pipeline.txt2img("a house", **options))
    assert not np.array_equal(inverted[0], guided.pixels)
    # edges are the same, whichever side is the bright one
    pipeline.set_control(path, picture, 0.5, finds_edges=True)
    edges = pixels(pipeline.txt2img("a house", **options))
    pipeline.set_control(path, 255 - picture, 0.5, finds_edges=True)
    np.testing.assert_array_equal(pixels(pipeline.txt2img("a house", **options)), edges)
    for strength in (0.0, None):
        pipeline.set_control(*(() if strength is None else (path, picture, strength)))
        np.testing.assert_array_equal(pixels(pipeline.txt2img("a house", **options)), plain)
    with pytest.raises(InputError, match="control_strength 3: allowed is 0 to 2"):
        pipeline.set_control(path, picture, 3)


def test_tokens_are_merged_inside_a_controlnet(pipeline, controlnet):
    pipeline.set_control(*controlnet)
    net = pipeline._added.control.net
    unmerged = pixels(pipeline.txt2img("a house", steps=2, reuse_deep=2))
    assert net.tome.saved_work() == 0
    pipeline.set_tome({"ratio": 0.5})
    merged = pixels(pipeline.txt2img("a house", steps=2, hires_scale=2))
    assert net.tome.saved_work() > 0.2
    assert merged.shape == (1, 32, 32, 3)
    assert unmerged.shape == (1, 16, 16, 3)
    pipeline.model.model.diffusion_model.tome.n_timesteps = 10_000  # so that all steps are late
    pipeline.set_tome({"steps": [[0, 0.5], [0.8, 0.5], [0.81, 0]]})
    pipeline.txt2img("a house", steps=2)
    assert net.tome.saved_work() == 0


def test_a_controlnet_guides_an_inpainting_model(inpainting, controlnet, photograph):
    mask = np.ones((16, 24), bool)
    plain = pixels(inpainting.inpaint(photograph, mask, "x", steps=2))
    inpainting.set_control(*controlnet)
    assert not np.array_equal(pixels(inpainting.inpaint(photograph, mask, "x", steps=2)), plain)


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", ["image", "upstream"])
def test_threads_take_turns_and_draw_what_each_would_alone(pipeline, rng):
    jobs = [("a house", None), ("hills", {"ratio": 0.5}), ("the sea", {"method": "random", "r": 9})]

    def pictures(prompt, tome):
        pipeline.set_tome(tome)
        return pipeline.generate(Settings(prompt, seed=7, n_iter=3, steps=3, rng=rng, eta=1.0))

    alone = [pixels(pictures(*job)) for job in jobs]
    streams = [pictures(*job) for job in jobs]  # each keeps the merging of when it was asked for
    together = drawn_in_threads(streams)
    for drawn, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(pixels(drawn), expected)
    kinds = [[p.settings["tome"]["r"] for p in drawn] for drawn in together]
    assert kinds == [[None] * 3, [None] * 3, [9] * 3]


def test_pipelines_share_the_global_generators_in_turns(tiny_checkpoint):
    both = [Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="float32") for _ in "ab"]
    settings = Settings("hills", seed=7, n_iter=3, steps=4, rng="upstream", eta=1.0)
    alone = pixels(both[0].generate(settings))

    def pictures(pipeline):
        yield from pipeline.generate(settings)

    for drawn in drawn_in_threads([pictures(one) for one in both]):
        np.testing.assert_array_equal(pixels(drawn), alone)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "stage"), [("model", "U-Net"), ("first_stage_model", "first stage")]
)
def test_half_precision_that_overflows_is_retried_in_float32(tiny_checkpoint, caplog, part, stage):
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="float32")
    expected = pixels(pipeline.txt2img("a house", rng="upstream", n_iter=2))
    module = getattr(pipeline.model, part).bfloat16()
    forward = "decode" if part == "first_stage_model" else "forward"
    original = getattr(module, forward)

    def overflow(*args, **kwargs):
        result = original(*args, **kwargs)
        is_half = next(module.parameters()).dtype == torch.bfloat16
        return result * float("nan") if is_half else result

    setattr(module, forward, overflow)
    pictures = pixels(pipeline.txt2img("a house", rng="upstream", n_iter=2))
    assert f"the {stage} gives values that are not numbers in torch.bfloat16" in caplog.text
    assert caplog.text.count("using float32") == 1
    assert np.abs(pictures.astype(int) - expected).mean() < 8  # weights rounded to bfloat16


def test_a_model_that_gives_nan_in_float32_is_an_error(pipeline):
    next(pipeline.model.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"the U-Net of .*tiny\.safetensors gives values that are"):
        pipeline.txt2img("a house")


def test_what_is_too_large_is_named_not_the_file(pipeline, extras):
    pipeline.set_loras([(extras[0], 90)])
    pipeline.set_embeddings([extras[1]])
    pipeline.model.apply_model = lambda x, t, c: x * float("inf")
    settings = {"scale": 900, "emphasis": True, "steps": 1}
    with pytest.raises(InputError) as caught:
        pipeline.txt2img("a cat-toy (house:80)", **settings)
    assert str(caught.value).endswith(
        "in float32 too: lower LoRA style (weight 90), the embedding cat-toy, scale 900, the "
        "emphasis 80, or leave it out"
    )


def test_a_controlnet_or_vae_that_is_too_large_is_named(tiny_checkpoint, controlnet, tmp_path):
    path, picture = controlnet
    control = {"net": path, "picture": picture}
    vae = tmp_path / "large.safetensors"
    weights = load_file(tiny_checkpoint)
    stage = {name: one for name, one in weights.items() if name.startswith("first_stage_model.")}
    save_file({name: 1e30 * one for name, one in stage.items()}, vae)
    pipeline = Pipeline.from_checkpoint(
        tiny_checkpoint, device="cpu", dtype="float32", control=control, vae=vae
    )
    with pytest.raises(InputError, match=r"the first stage of .*large\.safetensors gives values"):
        pipeline.txt2img("a house", steps=1)
    net = pipeline._added.control.net
    next(net.parameters()).data.fill_(float("inf"))
    with pytest.raises(InputError, match="float32 too: lower the ControlNet scribble, or leave"):
        pipeline.txt2img("a house", steps=1)


@pytest.mark.parametrize(("value", "name"), [(-3.0, "black"), (0.5, r"RGB \[191, 191, 191\]")])
def test_a_picture_of_a_single_colour_is_noticed(pipeline, caplog, value, name):
    pipeline.model.decode_first_stage = lambda z: torch.full((1, 3, 16, 16), value)
    pipeline.txt2img("a house", steps=1)
    assert re.search(f"a picture is of a single colour, {name}: ", caplog.text)


def test_too_little_memory_becomes_advice(pipeline):
    def fail(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 12 GB")

    pipeline.model.apply_model = fail
    with pytest.raises(InputError, match="not enough memory: try n_samples 1"):
        pipeline.txt2img("a house")


def test_too_little_memory_for_loading_becomes_advice(tiny_checkpoint, monkeypatch):
    def fail(*args):
        raise RuntimeError("unable to mmap 4265146304 bytes from file <m.ckpt>: Cannot allocate")

    monkeypatch.setattr("ldm.loaded.load_model", fail)
    with pytest.raises(OutOfMemory, match="not enough memory: try --dtype bfloat16"):
        Pipeline.from_checkpoint(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("name", ["tome", "loras", "embeddings", "control"])
def test_what_is_set_elsewhere_says_where(pipeline, name):
    with pytest.raises(InputError, match=rf"^{name} is set .*: pipeline\.set_{name}\(\.\.\.\)$"):
        pipeline.txt2img("x", **{name: None})
    assert hasattr(pipeline, f"set_{name}")


def test_a_name_that_is_no_setting_is_refused_with_those_that_are(pipeline, photograph):
    with pytest.raises(
        InputError, match=r"^'stepz' is no setting of a picture; .*\bsteps\b.* are$"
    ):
        pipeline.img2img(photograph, "x", stepz=3)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pipeline_is_not_copied(pipeline, copied):
    with pytest.raises(
        TypeError, match=r"cannot be copied or pickled: load another one with from_"
    ):
        copied(pipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"C": 8}, "C 8: this model's is 4"), ({"f": 8}, "f 8: this model's is 2")],
)
def test_a_geometry_that_is_not_the_model_s_is_refused(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        pipeline.txt2img("x", **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:7"}, "torch sees"),
        ({"dtype": "float16"}, "float16 is for GPUs"),
        ({"tome": {"ratoi": 0.5}}, "no key 'ratoi'"),
        ({"tome": {"ratio": 0.9}}, "at most 0.75"),
        ({"ema": True}, "no EMA"),
        ({"parameterization": "x"}, "parameterization 'x'"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(tiny_checkpoint, arguments, message):
    with pytest.raises(InputError, match=message):
        Pipeline.from_checkpoint(tiny_checkpoint, **{"device": "cpu", **arguments})


def test_bfloat16_draws_almost_the_same_picture(pipeline, tiny_checkpoint):
    half = Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="bfloat16")
    picture = half.txt2img("a house")[0]
    assert picture.settings["dtype"] == "bfloat16"
    expected = pipeline.txt2img("a house")[0].pixels
    assert 0 < np.abs(picture.pixels.astype(int) - expected).mean() < 8


# --- LoRA and textual inversion ---------------------------------------------------------------


@pytest.fixture
def extras(tmp_path):
    """Files for the tiny model: a LoRA of U-Net and text encoder, and an embedding."""
    random = torch.Generator().manual_seed(0)
    lora = {}
    for layer, (n_out, n_in) in {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (32, 16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (32, 16),
    }.items():
        lora[f"{layer}.lora_down.weight"] = torch.randn(4, n_in, generator=random)
        lora[f"{layer}.lora_up.weight"] = torch.randn(n_out, 4, generator=random)
    save_file(lora, tmp_path / "style.safetensors")
    vectors = torch.randn(2, 16, generator=random)
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "cat-toy.pt")
    return tmp_path / "style.safetensors", tmp_path / "cat-toy.pt"


def test_loras_and_embeddings_come_and_go(pipeline, tiny_checkpoint, extras, caplog):
    lora, embedding = extras
    prompt = "a cat-toy"
    plain = pixels(pipeline.txt2img(prompt))
    with caplog.at_level("INFO"):
        pipeline.set_loras([(lora, 0.5)])
        pipeline.set_embeddings([embedding])
    assert "LoRA style.safetensors: weight 0.5, rank 4, 1 layers of the U-Net and 1" in caplog.text
    assert "Embedding cat-toy.pt: 2 vectors; write 'cat-toy' in a prompt" in caplog.text
    (picture,) = pipeline.txt2img(prompt)
    assert not np.array_equal(picture.pixels, plain[0])
    (about,) = picture.settings["loras"]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert about == {"name": "style", "hash": digest[:12], "weight": 0.5}
    assert [one["name"] for one in picture.settings["embeddings"]] == ["cat-toy"]
    text = web_ui_text(picture.settings)
    assert 'Loras: "style:0.5", Embeddings: cat-toy' in text

    at_once = Pipeline.from_checkpoint(
        tiny_checkpoint, device="cpu", dtype="float32", loras=[(lora, 0.5)], embeddings=[embedding]
    )
    np.testing.assert_array_equal(at_once.txt2img(prompt)[0].pixels, picture.pixels)

    pipeline.set_embeddings([])
    assert not np.array_equal(pixels(pipeline.txt2img(prompt))[0], picture.pixels)
    pipeline.set_loras([])
    (picture,) = pipeline.txt2img(prompt)
    np.testing.assert_array_equal(picture.pixels, plain[0])
    assert not {"loras", "embeddings"} & set(picture.settings)


def test_files_that_do_not_fit_are_refused_before_anything_is_loaded(
    pipeline, tiny_checkpoint, extras, tmp_path, monkeypatch
):
    lora, embedding = extras
    monkeypatch.setattr("ldm.loaded.load_model", None)
    with pytest.raises(InputError, match=r"cat-toy.pt is no LoRA|holds no tensors"):
        Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", loras=[(embedding, 1)])
    with pytest.raises(InputError, match="is no textual-inversion embedding: it has 4 tensors"):
        Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", embeddings=[lora])
    with pytest.raises(InputError, match="both stand for 'cat-toy'"):
        pipeline.set_embeddings([embedding, embedding])


@pytest.fixture
def offered(extras, tmp_path, monkeypatch):
    """The same files, in folders where prompts can name them."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("style.safetensors", "lora"), ("cat-toy.pt", "embeddings")):
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "models" / folder / name)
    return tmp_path / "models" / "lora" / "style.safetensors"


def test_prompts_name_loras_for_themselves_alone(pipeline, offered):
    before = {name: one.clone() for name, one in pipeline.model.state_dict().items()}
    prompts = ["a house", "a <lora:style:0.5>house", "a house<lora:style:2>", "a house"]
    settings = {"seed": 3, "negative_prompt": "a hill", "scale": 3.0}
    together = pipeline.txt2img(prompts, n_samples=4, **settings)
    alone = []
    for i, weight in enumerate((0, 0.5, 2, 0)):
        pipeline.set_loras([(offered, weight)] if weight else [])
        alone += pipeline.txt2img("a house", **{**settings, "seed": 3 + i})
    np.testing.assert_array_equal(pixels(together), pixels(alone))
    assert [one.settings["prompt"] for one in together] == prompts
    weights = [[lora["weight"] for lora in one.settings.get("loras", [])] for one in together]
    assert weights == [[], [0.5], [2.0], []]
    pipeline.txt2img(prompts[1], steps=1)
    pipeline.txt2img(prompts[0], steps=1)
    for name, one in pipeline.model.state_dict().items():
        assert torch.equal(one, before[name]), name
    with pytest.raises(InputError, match="prompts with different LoRAs need n_samples 1"):
        pipeline.txt2img(prompts, n_samples=2, rng="upstream")


def test_the_names_of_embeddings_are_words_of_a_prompt(pipeline, offered, caplog):
    (named,) = pipeline.txt2img("a Cat-Toy", steps=1)
    assert [one["name"] for one in named.settings["embeddings"]] == ["cat-toy"]
    (other,) = pipeline.txt2img("a cat-toys", steps=1)
    assert "embeddings" not in other.settings
    path = offered.parents[1] / "embeddings" / "cat-toy.pt"
    pipeline.set_embeddings([path])
    given = pipeline.txt2img("a cat-toy", steps=1)[0]
    np.testing.assert_array_equal(given.pixels, named.pixels)
    pipeline.set_embeddings([])
    torch.save({"string_to_param": {"*": torch.zeros(2, 7)}}, path)
    pipeline.txt2img("a cat-toy", steps=1)
    assert "cat-toy in a prompt is read as words" in caplog.text


def test_a_run_goes_on_with_what_it_began_with(pipeline, offered):
    settings = {"seed": 3, "n_iter": 2}
    expected = pixels(pipeline.txt2img("a house", **settings))
    run = pipeline.generate(Settings("a house", **settings))
    first = next(run)
    pipeline.set_loras([(offered, 2.0)])
    changed = pipeline.txt2img("a house", **settings)
    second = next(run)
    np.testing.assert_array_equal(pixels([first, second]), expected)
    assert "loras" not in second.settings
    assert (pixels(changed) != expected).any()
    np.testing.assert_array_equal(pixels(pipeline.txt2img("a house", **settings)), pixels(changed))


def test_a_lora_that_a_prompt_names_is_looked_at_before_loading(
    tiny_checkpoint, offered, monkeypatch
):
    monkeypatch.setattr("ldm.loaded.load_model", None)
    for name in ("other", "../lora/style", str(offered)):
        with pytest.raises(InputError, match="not in models/lora, where there are: style"):
            Pipeline.from_checkpoint(
                tiny_checkpoint, device="cpu", prompts=["x", f"<lora:{name}:1>"]
            )
    save_file({"x.lora_down.weight": torch.zeros(1)}, offered)
    with pytest.raises(InputError, match=r"style\.safetensors"):
        Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", prompts=["<lora:style>"])


def test_the_words_of_embeddings_are_known_and_counted(pipeline, extras, caplog, monkeypatch):
    pipeline.defaults["vocabulary"] = "a model's that knows few words"
    monkeypatch.setattr("ldm.pipeline.word_list", lambda path: {"a", "and"})
    pipeline.set_embeddings([extras[1]])
    pipeline.txt2img("a cat-toy and a horse")
    assert "never seen: horse" in caplog.text
    pipeline.txt2img("cat-toy " * 38)
    assert "does not see its end: 'cat-toy'" in caplog.text


def test_a_vae_beside_the_model_is_used_and_noted(tmp_path, tiny_checkpoint):
    plain = Pipeline.from_checkpoint(tiny_checkpoint).txt2img("hills", steps=1)
    with safe_open(tiny_checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("first_stage_model.")]  # noqa: SIM118
        other = {name: file.get_tensor(name) + 0.01 for name in names}
    save_file(other, tmp_path / "other.safetensors")
    with_other = Pipeline.from_checkpoint(tiny_checkpoint, vae=tmp_path / "other.safetensors")
    (picture,) = with_other.txt2img("hills", steps=1)
    assert picture.settings["model"]["vae"] == "other.safetensors"
    assert "vae" not in plain[0].settings["model"]
    assert not (pixels([picture]) == pixels(plain)).all()
