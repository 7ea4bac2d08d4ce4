import threading

import numpy as np
import pytest

from ldm.cli.jobs import Job
from ldm.errors import InputError
from ldm.images import Gallery, load_rgb, read_settings
from ldm.settings import Settings
from ldm.web.runner import Drawn, Finished, Message, Progress, Runner, Stopped, Task

ARGUMENTS = {
    **{"config": None, "device": "cpu", "dtype": "float32", "tome": None, "attention": "sdpa"},
    **{"ema": False, "parameterization": None},
}


@pytest.fixture
def runner(tiny_checkpoint, tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_text("just some text")
    models = {"tiny": tiny_checkpoint, "broken": broken}
    return Runner(models, ARGUMENTS, Gallery(tmp_path / "out", has_grid=False))


def task(tome=False, model="tiny", **kwargs):
    settings = {"prompt": "a house", "steps": 3, "seed": 7, **kwargs.pop("settings", {})}
    return Task(model, Job(Settings(**settings), tome), **kwargs)


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def files(runner):
    folder = runner.gallery.folder
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_picture_is_drawn_and_saved_as_by_the_script(runner, caplog):
    caplog.set_level("INFO", "ldm")
    events = list(runner.draw(task({"ratio": 0.5})))
    (drawn,) = of_kind(events, Drawn)
    assert files(runner) == ["samples/00000.png"]
    assert (load_rgb(drawn.path) == drawn.picture.pixels).all()
    about = read_settings(drawn.path)
    assert (about["prompt"], about["seed"], about["tome"]["ratio"]) == ("a house", 7, 0.5)
    (finished,) = of_kind(events, Finished)
    assert finished.is_merged
    assert 0 < finished.step_seconds < finished.seconds
    assert [e.text for e in of_kind(events, Progress)][-3:] == [f"step {i} of 3" for i in (1, 2, 3)]
    (line, warning) = [e for e in of_kind(events, Message) if e.text.startswith("ToMe")]
    assert "64 -> 32 tokens" in line.text
    assert (line.is_warning, warning.is_warning) == (False, True)


def test_previews_change_nothing_and_look_like_the_picture(runner, monkeypatch):
    plain = of_kind(runner.draw(task()), Drawn)[0].picture.pixels
    monkeypatch.setattr("ldm.web.runner.PREVIEW_EVERY", 0.0)
    events = list(runner.draw(task()))
    previews = [e.preview for e in of_kind(events, Progress) if e.preview is not None]
    assert len(previews) == 2
    assert previews[0].shape == (256, 256, 3)
    assert (of_kind(events, Drawn)[0].picture.pixels == plain).all()
    error = np.abs(previews[-1].mean((0, 1)) - plain.mean((0, 1)))
    assert error.max() < 32


def test_a_comparison_is_the_same_noise_with_and_without(runner):
    events = list(runner.draw(task({"ratio": 0.5}, compare=True, settings={"seed": -1})))
    merged, unmerged = of_kind(events, Drawn)
    assert (merged.is_merged, unmerged.is_merged) == (True, False)
    one, two = (read_settings(drawn.path) for drawn in (merged, unmerged))
    assert one["seed"] == two["seed"]
    assert (one["tome"]["ratio"], two["tome"]["ratio"]) == (0.5, None)
    assert [f.is_merged for f in of_kind(events, Finished)] == [True, False]
    with pytest.raises(InputError, match="no merging to compare with"):
        list(runner.draw(task(compare=True)))


def test_a_stop_takes_hold_at_the_next_step_and_leaves_nothing(runner):
    stop = threading.Event()
    events = runner.draw(task(settings={"steps": 500}), stop)
    next(e for e in events if isinstance(e, Progress) and e.text.startswith("step"))
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    assert files(runner) == []
    assert of_kind(runner.draw(task()), Drawn)


def test_whoever_listens_no_more_stops_the_job(runner):
    events = runner.draw(task(settings={"steps": 500}))
    next(e for e in events if isinstance(e, Progress) and e.text.startswith("step"))
    events.close()
    runner.close()
    assert files(runner) == []


def test_jobs_wait_for_their_turn_and_can_be_stopped_before(runner):
    list(runner.load("tiny"))
    first = runner.draw(task(settings={"steps": 500}))
    next(e for e in first if isinstance(e, Progress) and e.text.startswith("step"))
    stop = threading.Event()
    second = runner.draw(task(), stop)
    assert next(second).text == "Waiting for another job"
    stop.set()
    with pytest.raises(Stopped):
        list(second)
    first.close()


def test_a_wrong_checkpoint_leaves_the_loaded_model(runner):
    list(runner.load("tiny"))
    with pytest.raises(InputError, match="is a text file, not a checkpoint"):
        list(runner.load("broken"))
    with pytest.raises(InputError, match="choose one of tiny, broken"):
        list(runner.load("other"))
    assert runner.loaded == "tiny"
    assert of_kind(runner.draw(task()), Drawn)


def test_a_picture_to_start_from(runner, tmp_path):
    (drawn,) = of_kind(runner.draw(task()), Drawn)
    start = task(init=drawn.path, init_name="mine.png", settings={"strength": 0.5})
    (again,) = of_kind(runner.draw(start), Drawn)
    about = read_settings(again.path)
    assert (about["init_img"], about["strength"]) == ("mine.png", 0.5)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(InputError, match="not a picture that can be read"):
        list(runner.draw(task(init=empty)))


def test_settings_are_described_before_they_are_used(runner):
    assert runner.describe(False) == "ToMe: off"
    assert runner.describe({"ratio": 0.5}) == "ToMe: grid 2x2 ratio=0.5 window=3 on attn"
    with pytest.raises(InputError, match=r"can remove at most 0\.75"):
        runner.describe({"ratio": 0.9})
