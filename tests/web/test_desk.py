import numpy as np
import pytest

from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish
from ldm.settings import Settings
from ldm.web import limits
from ldm.web.compare import cells
from ldm.web.draw import with_unmerged
from ldm.web.task import Draw

FORM = {"rows": "nothing", "of_rows": "", "columns": "nothing", "of_columns": ""}


def draw(**settings):
    return [
        Draw(Settings(**{"prompt": "x", "seed": 1, "steps": 1, **settings}), ToMeWish(is_off=True))
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_iter": 4_000_000}, "Pictures 4000000: allowed is"),
        ({"n_iter": 500, "n_samples": 3}, "Pictures 1500: allowed are 1000"),
        ({"W": 16_000, "H": 16_000}, "Width 16000, Height 16000: allowed are 64 million pixels"),
        ({"hires_scale": 4.0, "W": 4096, "H": 4096}, "Width 16384, Height 16384"),
        ({"prompt": "x" * 30_000}, "Prompt: 30000 characters"),
        ({"seed": 2**63 - 1, "n_iter": 2}, "Seed 9223372036854775807: there are not 2"),
    ],
)
def test_what_is_too_much_is_refused_before_it_waits(desk, settings, message):
    try:
        with pytest.raises(InputError) as error:
            desk.order("tiny", draw(**settings))
        assert message in limits.in_labels(str(error.value))
    finally:
        assert desk.queue.jobs() == []


def test_sizes_are_held_against_the_memory(desk, monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda device: 2**30)
    with pytest.raises(InputError, match=r"Width 2048, Height 2048: that takes about .* GiB"):
        desk.order("tiny", draw(W=2048, H=2048))
    params = {
        "unet_config": {"params": {"model_channels": 320}},
        "first_stage_config": {"params": {"ddconfig": {"ch": 128, "ch_mult": [1, 2, 4, 4]}}},
    }
    # SD 1.5 in bfloat16 takes 1.27 GB beside its weights for a picture of 512x512
    assert 1.0e9 < limits.estimate(512 * 512, 1, params, "bfloat16") < 1.6e9
    assert limits.estimate(512 * 512, 8, params, "bfloat16") > 1.3e9
    # and 5.2 GB for one of 2048x2048, most of which is decoded in strips
    assert 5.2e9 < limits.estimate(2048 * 2048, 1, params, "bfloat16") < 7.8e9


def test_a_second_pass_and_a_picture_to_start_from_do_not_go_together(desk):
    with pytest.raises(InputError, match="Enlarge by 2"):
        desk.order("tiny", draw(hires_scale=2.0), init=np.zeros((16, 16, 3), np.uint8))
    start = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(InputError, match="nothing to paint"):
        desk.order("tiny", draw(), init=start, mask=np.zeros((16, 16), bool))


def test_a_mask_of_another_shape_would_lie_elsewhere(desk):
    start = np.zeros((16, 24, 3), np.uint8)
    with pytest.raises(InputError, match="mask: it is 16x24, but the picture is 24x16"):
        desk.order("tiny", draw(), init=start, mask=np.ones((24, 16), bool))
    job = desk.order("tiny", draw(W=24, H=16), init=start, mask=np.ones((33, 50), bool))
    desk.queue.wait(job, 60)
    assert job.error is None


def grid(desk, base, form=None, **kwargs):
    form = base.first_form({"prompt": "a red house", "steps": 2}) | {"seed": 5, **(form or {})}
    return cells(desk, base, "tiny", form, **{**FORM, **kwargs})


def test_a_grid_draws_each_unmerged_picture_once(desk, base):
    axes = {"rows": "ToMe ratio", "of_rows": "0, 0.5, 0.25"}
    draws, found = grid(desk, base, **axes, columns="Steps", of_columns="2,3")
    assert found.n_columns == 2
    assert len(draws) == 6
    labels = [draws[i].label for i in found.cells]
    assert labels[:3] == [
        "ToMe ratio 0 | Steps 2",
        "ToMe ratio 0 | Steps 3",
        "ToMe ratio 0.5 | Steps 2",
    ]
    assert [draws[i].tome for i in found.unmerged] == [ToMeWish(is_off=True)] * 6
    for cell, plain in zip(found.cells, found.unmerged, strict=True):
        assert draws[cell].settings == draws[plain].settings


@pytest.mark.parametrize(
    ("merging", "axes"),
    [
        ({"hires_scale": 2.0, "hires_ratio": "0.5"}, {}),
        ({}, {"rows": "ToMe preset", "of_rows": "trim_context"}),
    ],
)
def test_what_a_second_pass_or_a_shorter_text_changes_is_compared(desk, base, merging, axes):
    draws, found = grid(desk, base, merging, **axes)
    assert len(draws) == 2
    assert (found.cells, found.unmerged) == ((1,), (0,))
    merged, unmerged = with_unmerged(desk, "tiny", draws[1], compare=True)
    assert (merged.tome, unmerged.tome) == (draws[1].tome, ToMeWish(is_off=True))
    with pytest.raises(InputError, match="no merging to compare with"):
        with_unmerged(desk, "tiny", draws[0], compare=True)


def test_a_part_of_the_prompt_can_differ(desk, base):
    draws, _ = grid(desk, base, rows="Prompt part", of_rows="red, blue")
    assert [one.settings.prompt for one in draws] == ["a red house", "a blue house"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"rows": "Steps", "of_rows": ""}, "give some"),
        ({"rows": "Steps", "of_rows": "0"}, "0: allowed is 1 to 1000"),
        ({"rows": "Steps", "of_rows": ",".join(map(str, range(1, 100)))}, "99 x 1 pictures"),
        ({"rows": "Seed", "of_rows": "1", "columns": "Seed", "of_columns": "2"}, "both Seed"),
        ({"rows": "ToMe preset", "of_rows": "/etc/passwd"}, "choose one of"),
        ({"rows": "Prompt part", "of_rows": "green, blue"}, "not in the prompt"),
        ({"rows": "ckpt", "of_rows": "x"}, "choose one of"),
        ({"rows": ["Steps"], "of_rows": "x"}, "choose one of"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(desk, base, axes, message):
    with pytest.raises(InputError, match=message):
        grid(desk, base, **axes)


def test_a_grid_is_drawn_and_says_what_it_shows(desk, base):
    axes = {"rows": "ToMe ratio", "of_rows": "0, 0.5"}
    draws, found = grid(desk, base, **axes)
    job = desk.order("tiny", draws, grid=found)
    desk.queue.wait(job, 120)
    assert job.error is None
    names = [one.name for one in job.report.pictures]
    assert names == ["samples/00000.png", "samples/00001.png", "grid-0000.png"]
    assert job.report.infos[-1]["grid"] == ["ToMe ratio 0", "ToMe ratio 0.5"]
