import threading

import numpy as np
import pytest

from ldm.errors import InputError
from ldm.images import load_rgb, read_settings
from ldm.modules.tome.config import ToMeWish
from ldm.pipeline import Pipeline
from ldm.settings import Settings
from ldm.web.queue import Job, State, Stopped
from ldm.web.report import Report
from ldm.web.task import Draw, Task
from tests.tiny_models import files


def task(tome=None, model="tiny", **kwargs):
    settings = {"prompt": "a house", "steps": 3, "seed": 7, **kwargs.pop("settings", {})}
    wish = ToMeWish(tome or {}, is_off=tome is None)
    return Task(model, (Draw(Settings(**settings), wish),), **kwargs)


def run(runner, one, tell=None):
    """Do a job here and now; ``tell`` is called at every change with the job."""
    job = Job(1, one, Report("x", n_pictures=one.n_pictures), lambda: None)
    if tell is not None:
        job.tell = lambda: tell(job)
    runner.work(job)
    return job.report


def pixels(runner, name="00000"):
    return load_rgb(runner.gallery.folder / "samples" / f"{name}.png")


def test_a_picture_is_drawn_and_saved_as_by_the_script(runner, caplog):
    caplog.set_level("INFO", "ldm")
    texts = []
    report = run(runner, task({"ratio": 0.5}), lambda job: texts.append(job.report.text))
    assert files(runner.gallery.folder) == ["samples/00000.png"]
    assert [one.name for one in report.pictures] == files(runner.gallery.folder)
    about = read_settings(runner.gallery.folder / "samples" / "00000.png")
    assert (about["prompt"], about["seed"], about["tome"]["ratio"]) == ("a house", 7, 0.5)
    assert list(dict.fromkeys(texts))[-3:] == [f"step {i} of 3" for i in (1, 2, 3)]
    lines = {line.kind: line.text for line in report.lines}
    assert "64 -> 32 tokens" in lines["tome"]
    assert lines["warning"].startswith("warning: ToMe")
    assert any(line.text.startswith("With merging: ") for line in report.lines)


def test_previews_change_nothing_and_look_like_the_picture(runner, monkeypatch):
    run(runner, task())
    monkeypatch.setattr("ldm.web.runner.PREVIEW_EVERY", 0.0)
    previews = []
    encode = lambda pixels, **_: previews.append(pixels) or b"webp"  # noqa: E731
    monkeypatch.setattr("ldm.images.encode_webp", encode)
    report = run(runner, task())
    assert (len(previews), report.n_previews, report.preview) == (2, 2, None)
    assert previews[0].shape == (256, 256, 3)
    assert (pixels(runner, "00001") == pixels(runner)).all()
    error = np.abs(previews[-1].mean((0, 1)) - pixels(runner).mean((0, 1)))
    assert error.max() < 32


def test_what_is_said_of_one_checkpoint_holds_for_no_other(runner, tiny_checkpoint):
    models = {"first": tiny_checkpoint, "other": tiny_checkpoint}
    said = {**runner.arguments, "parameterization": "v"}
    for own, kinds in (("first", ("v", "eps")), (None, ("v", "v"))):
        page = type(runner)(models, said, runner.gallery, own)
        assert tuple(page.info(name).prediction for name in models) == kinds
        for name, kind in zip(models, kinds, strict=True):
            assert page.load(name).model.parameterization == kind


def test_several_pictures_are_those_of_a_single_run(runner):
    run(runner, task(settings={"n_iter": 2, "n_samples": 2}))
    whole = runner.pipeline.txt2img("a house", steps=3, seed=7, n_iter=2, n_samples=2)
    for i, picture in enumerate(whole):
        assert (pixels(runner, f"{i:05}") == picture.pixels).all()


def test_progress_names_the_picture_and_its_share_rises(runner):
    seen = []
    run(
        runner,
        task(settings={"n_iter": 3, "hires_scale": 2.0}),
        lambda job: seen.append((job.report.text, job.report.share)),
    )
    assert any(text == "picture 2 of 3, step 1 of 3" for text, _ in seen)
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_stop_takes_hold_at_the_next_step_and_leaves_nothing(runner):
    def stop(job):
        if "step 2" in job.report.text:
            job.stop.set()

    with pytest.raises(Stopped):
        run(runner, task(settings={"steps": 500}), stop)
    assert files(runner.gallery.folder) == []
    run(runner, task())
    assert files(runner.gallery.folder) == ["samples/00000.png"]


def test_a_skip_ends_one_picture_of_several(runner):
    def skip(job):
        if job.report.text == "picture 1 of 2, step 2 of 5":
            job.skip.set()

    report = run(runner, task(settings={"n_iter": 2, "steps": 5}), skip)
    assert len(report.pictures) == 1
    assert report.infos[0]["seed"] == 8
    assert "One picture was skipped" in [line.text for line in report.lines]


def test_a_skip_ends_all_that_are_drawn_together_and_says_so(runner):
    def skip(job):
        if job.report.text == "pictures 1 to 2 of 4, step 2 of 5":
            job.skip.set()

    report = run(runner, task(settings={"n_iter": 2, "n_samples": 2, "steps": 5}), skip)
    assert [one["seed"] for one in report.infos] == [9, 10]
    assert "2 pictures were skipped" in [line.text for line in report.lines]


def test_a_wrong_checkpoint_leaves_the_loaded_model(runner):
    runner.load("tiny")
    with pytest.raises(InputError, match="is a text file, not a checkpoint"):
        run(runner, task(model="broken"))
    with pytest.raises(InputError, match="choose one of tiny, broken"):
        run(runner, task(model="other"))
    assert runner.loaded == "tiny"
    assert run(runner, task()).pictures


def test_while_a_model_loads_it_is_the_one_that_is_asked_for(runner, monkeypatch):
    """A request that names no model gets it, not the first of all."""
    runner.models["second"] = runner.models["tiny"]
    runner.load("tiny")
    load, seen = Pipeline.from_checkpoint, []

    def slowly(**arguments):
        seen.append((runner.loaded, runner.pipeline))
        return load(**arguments)

    monkeypatch.setattr(Pipeline, "from_checkpoint", slowly)
    runner.load("second")
    assert seen == [("second", None)]
    monkeypatch.setattr(Pipeline, "from_checkpoint", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.load("tiny")
    assert runner.loaded is None


def test_a_picture_to_start_from_and_a_mask(runner):
    run(runner, task())
    start = pixels(runner)
    again = task(init=start, init_name="mine.png", settings={"strength": 0.5})
    about = run(runner, again).infos[0]
    assert (about["init_img"], about["strength"]) == ("mine.png", 0.5)
    mask = np.zeros(start.shape[:2], bool)
    mask[:8] = True
    run(runner, task(init=start, mask=mask, settings={"seed": 9}))
    painted = pixels(runner, "00002")
    assert (painted[8:] == start[8:]).all()
    assert (painted[:8] != start[:8]).any()


def test_settings_are_described_before_they_are_used(runner):
    assert runner.describe("tiny", False) == "ToMe: off"
    said = "ToMe: grid 2x2 ratio=0.5 window=3 on attn"
    assert runner.describe("tiny", {"ratio": 0.5}) == said
    said = "ToMe: off; second pass: grid 2x2 ratio=0.5 window=3 on attn"
    assert runner.describe("tiny", {"hires": {"ratio": 0.5}}) == said
    with pytest.raises(InputError, match=r"can remove at most 0\.75"):
        runner.describe("tiny", {"ratio": 0.9})


def test_the_queue_draws_in_order_without_the_page(desk):
    draws = [Draw(Settings("x", steps=1, seed=seed), ToMeWish(is_off=True)) for seed in range(10)]
    jobs = [desk.order("tiny", [draw]) for draw in draws]
    desk.queue.wait(jobs[-1], 120)
    assert [job.state for job in jobs] == [State.DONE] * 10
    made = [job.report.pictures[0].name for job in jobs]
    assert made == [f"samples/{i:05}.png" for i in range(10)]
    assert threading.active_count() < 10
