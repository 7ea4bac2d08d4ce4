import csv
import io

import numpy as np
import pytest
import torch

from ldm.distributed import ALONE, Process
from ldm.evaluation.appendix_f.networks import Judge
from ldm.evaluation.appendix_f.plan import Plan, Setting, control_settings
from ldm.evaluation.appendix_f.statistics import Statistics
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.table import add_equal_time, make_table, read, table_csv, to_csv
from ldm.evaluation.appendix_f.work import Work
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings

SETTINGS = (
    Setting("unmerged"),
    Setting("half", ToMeConfig(ratio=0.5)),
    Setting("most", ToMeConfig(ratio=0.75)),
)


JUDGE = Judge("frechet", "of-a-test", "a test", 2, lambda looked: None)
FEWER = Setting("fewer", control="steps", sampling={"steps": 6, "sampler": "ddim"})
FEW = Setting("few", control="steps", sampling={"steps": 3, "sampler": "ddim"})


def psnr_of(setting, number):
    return 40.0 - 3 * number - 5 * (*SETTINGS, FEWER, FEW).index(setting)


def make_plan(n_samples=2, control_share=1):
    settings = {16: (*SETTINGS, FEWER, FEW)}
    return Plan(
        settings, ("a", "b", "c"), 2, Settings(n_samples=n_samples, steps=10), control_share
    )


@pytest.fixture
def store(tmp_path):
    """All pictures but those of "half" for the first prompt, and of "most" for the last one."""
    plan, store = make_plan(), Store(tmp_path)
    for batch in plan.batches():
        for setting in plan.settings_of(batch):
            if (setting.name, batch.first) in (("half", 0), ("most", 4)):
                continue
            distance = [{"psnr_db": psnr_of(setting, i)} for i in batch.numbers]
            rows = [{}] * 2 if setting.name == "unmerged" else distance
            about = [
                {**setting.sampling, "prompt": prompt, "seed": seed}
                for prompt, seed in batch.pictures
            ]
            pixels = [np.zeros((16, 16, 3), np.uint8)] * len(rows)
            store.add(setting, batch, pixels, about, [{**row, "seconds": 2.0} for row in rows])
            vectors = np.array([[i, i % 2] for i in batch.numbers], np.float32)
            store.add_judged(setting, batch, {JUDGE.entry: vectors})
    return store


def test_means_are_over_whole_prompts_and_differences_over_common_ones(store):
    plan = make_plan()
    results = read(plan, store, ALONE, [JUDGE])
    reference = {16: Statistics(torch.zeros(2).double(), torch.eye(2).double())}
    work = {(16, setting.key): Work(0.25, 0.1) for setting in plan.settings[16]}
    table = make_table(plan, results, work, reference, against=["half"])
    by_name = {row["setting"]: row for row in table}
    assert [row["n_prompts"] for row in table] == [3, 2, 2, 3, 3]
    half, most = SETTINGS[1:]
    expected = np.mean([psnr_of(half, i) for i in (2, 3, 4, 5)])
    assert by_name["half"]["measures"]["psnr_db"]["mean"] == pytest.approx(expected)
    assert "psnr_db" not in by_name["unmerged"]["measures"]
    assert by_name["most"]["differences"]["half"]["psnr_db"] == {"mean": -5, "low": -5, "high": -5}
    assert by_name["most"]["measures"]["frechet"]["mean"] > 0
    assert (by_name["most"]["saved_work"], by_name["most"]["seconds"]) == (0.25, 2.0)
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert [row["psnr_db minus that of half"] for row in rows][1:3] == ["", "-5.0"]
    assert most.key == rows[2]["key"]


def test_fewer_steps_are_compared_where_they_take_as_much_time(store):
    plan = make_plan()
    results = read(plan, store, ALONE, [JUDGE])
    work = {(16, setting.key): Work() for setting in plan.settings[16]}
    table = make_table(plan, results, work, {})
    unmerged, half, most = (setting.key for setting in SETTINGS)
    speedups = {(16, unmerged): 1.0, (16, half): 1.5, (16, most): 3.0}
    add_equal_time(table, results, speedups, 10, "sd1.5")
    by_name = {row["setting"]: row["equal_time"] for row in table}
    assert by_name["unmerged"] == by_name["fewer"] == {}
    found = by_name["half"]["ddim"]  # 10 / 1.5 leaves time for 6 of the 6 and 3 that were drawn
    assert (found["steps"], found["model"]) == (6, "sd1.5")
    assert found["differences"]["psnr_db"]["mean"] == 10
    assert by_name["most"]["ddim"]["steps"] == 3


def test_memory_is_shared_by_the_pictures_that_are_drawn_together(tmp_path):
    similar = Setting("similar", ToMeConfig(ratio=0.5, metric="hidden", similarity=0.9))
    plan = Plan({16: (SETTINGS[0], similar)}, ("a",), 2, Settings(n_samples=8))
    store = Store(tmp_path)
    (batch,) = plan.batches()
    for setting in plan.settings_of(batch):
        about = [{"prompt": prompt, "seed": seed} for prompt, seed in batch.pictures]
        pixels = [np.zeros((16, 16, 3), np.uint8)] * 2
        store.add(setting, batch, pixels, about, [{"peak_mib": 4096.0}] * 2)
    work = {(16, setting.key): Work(0.25, 0.1) for setting in plan.settings[16]}
    table = make_table(plan, read(plan, store, ALONE), work, {})
    assert [row["gib"] for row in table] == [2.0, 2.0]
    # how much goes is known of no picture before it is drawn
    assert [row["saved_whole"] for row in table] == [0.1, None]


def test_of_two_pictures_the_median_lies_between(tmp_path):
    plan = Plan({16: SETTINGS[:1]}, ("a", "b"), 1, Settings(n_samples=2))
    store = Store(tmp_path)
    (batch,) = plan.batches()
    about = [{"prompt": prompt, "seed": seed} for prompt, seed in batch.pictures]
    pixels = [np.zeros((16, 16, 3), np.uint8)] * 2
    store.add(SETTINGS[0], batch, pixels, about, [{"seconds": 1.0}, {"seconds": 3.0}])
    (row,) = make_table(plan, read(plan, store, ALONE), {(16, SETTINGS[0].key): Work()}, {})
    assert row["seconds"] == 2.0


def test_of_two_floors_the_worse_one_counts(tmp_path):
    floors = Setting("other type", control="precision"), Setting("formula", control="rounding")
    psnr = {"half": 58.0, "most": 56.0, "other type": 57.0, "formula": 90.0}
    plan = Plan({16: (*SETTINGS, *floors)}, ("a", "b"), 1, Settings(n_samples=2))
    store = Store(tmp_path)
    (batch,) = plan.batches()
    for setting in plan.settings_of(batch):
        about = [{"prompt": prompt, "seed": seed} for prompt, seed in batch.pictures]
        rows = [{"psnr_db": psnr[setting.name]} if setting.name in psnr else {}] * 2
        store.add(setting, batch, [np.zeros((16, 16, 3), np.uint8)] * 2, about, rows)
        store.add_judged(setting, batch, {JUDGE.entry: np.eye(2, dtype=np.float32)})
    work = {(16, setting.key): Work(0.25, 0.1) for setting in plan.settings[16]}
    reference = {16: Statistics(torch.zeros(2).double(), torch.eye(2).double())}
    table = make_table(plan, read(plan, store, ALONE, [JUDGE]), work, reference)
    assert all("frechet" in row["measures"] for row in table)
    assert [row["setting"] for row in table if row["above_floor"]] == ["half"]
    assert table[1]["above_floor"] == ["psnr_db"]


def test_a_table_of_nothing_has_no_rows():
    assert to_csv([]).strip() == ""


def test_what_each_process_read_is_put_together(store, monkeypatch):
    plan, parts = make_plan(), []
    monkeypatch.setattr(Process, "gathered", lambda _, mine: parts.append(mine) or parts)
    read(plan, store, Process(0, 2))
    both = read(plan, store, Process(1, 2))
    assert all(len(part) for part in parts)
    assert set(parts[0]).isdisjoint(parts[1])
    assert torch.equal(both.is_there[16, "unmerged"], torch.tensor([True, True, True]))


def test_a_picture_that_was_drawn_with_others_does_not_count(store):
    other = make_plan(n_samples=4)  # 0 to 3, then 4 and 5
    assert read(other, store, ALONE).is_there[16, "unmerged"].tolist() == [False, False, True]
    assert read(other, store, ALONE).features[16, "half"].shape == (3, 2, 0)


def test_controls_of_a_sample_are_of_whole_prompts_spread_over_all():
    plan = make_plan(n_samples=1, control_share=2)
    drawn = [batch.first for batch in plan.batches() if FEW in plan.settings_of(batch)]
    assert drawn == [0, 1, 4, 5]
    assert all(SETTINGS[1] in plan.settings_of(batch) for batch in plan.batches())


def test_controls_have_fewer_steps_of_both_samplers():
    found = control_settings(Settings(steps=10, sampler="ddim"))
    fewer = [s.sampling for s in found if s.control == "steps"]
    assert {s["sampler"] for s in fewer} == {"ddim", "dpm_solver"}
    assert sorted({s["steps"] for s in fewer}) == [4, 5, 6, 7, 8, 9]
    assert len({s.key for s in found}) == len(found)
