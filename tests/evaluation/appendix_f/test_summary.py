import csv
import io

import numpy as np
import pytest
import torch

from ldm.distributed import ALONE, Process
from ldm.evaluation.appendix_f.frechet import Statistics
from ldm.evaluation.appendix_f.measures import encode
from ldm.evaluation.appendix_f.plan import Plan, Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.summary import read, summarize, table_csv
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings

SETTINGS = (
    Setting("unmerged"),
    Setting("half", ToMeConfig(ratio=0.5)),
    Setting("most", ToMeConfig(ratio=0.75)),
)


def psnr_of(setting, number):
    return 40.0 - 3 * number - 5 * SETTINGS.index(setting)


@pytest.fixture
def plan():
    return Plan({16: SETTINGS}, ("a", "b", "c"), 2, Settings(n_samples=2))


@pytest.fixture
def store(plan, tmp_path):
    """All pictures but those of "half" for the first prompt, and of "most" for the last one."""
    store = Store(tmp_path)
    for batch in plan.batches():
        for setting in SETTINGS:
            if (setting.name, batch.first) in (("half", 0), ("most", 4)):
                continue
            rows = [
                {
                    **({} if setting.name == "unmerged" else {"psnr_db": psnr_of(setting, i)}),
                    "saved_work": 0.1,
                    "features": encode(torch.tensor([float(i), float(i % 2)])),
                }
                for i in batch.numbers
            ]
            pixels = [np.zeros((16, 16, 3), np.uint8)] * len(rows)
            store.add(setting, batch, pixels, [{}] * len(rows), rows)
    return store


def test_means_are_over_whole_prompts_and_differences_over_common_ones(plan, store):
    results = read(plan, store, ALONE, n_features=2)
    reference = {16: Statistics(torch.zeros(2).double(), torch.eye(2).double())}
    entries = summarize(plan, results, None, 1, reference, against=["half"])
    by_name = {entry.setting.name: entry for entry in entries}
    assert [entry.n_prompts for entry in entries] == [3, 2, 2]
    half, most = SETTINGS[1:]
    expected = np.mean([psnr_of(half, i) for i in (2, 3, 4, 5)])
    assert by_name["half"].estimates["psnr_db"].mean == pytest.approx(expected)
    assert "psnr_db" not in by_name["unmerged"].estimates
    difference = by_name["most"].differences["half"]["psnr_db"]
    assert (difference.mean, difference.low, difference.high) == (-5, -5, -5)
    assert by_name["most"].estimates["frechet"].mean > 0
    rows = list(csv.DictReader(io.StringIO(table_csv(entries))))
    assert [row["psnr_db minus that of half"] for row in rows] == ["", "", "-5.0"]
    assert most.key == rows[2]["key"]


def test_each_process_reads_its_own_share(plan, store):
    shares = [read(plan, store, Process(rank, 2)).is_there for rank in (0, 1)]
    assert shares[0][16, "unmerged"].tolist() == [True, False, True]
    assert shares[1][16, "unmerged"].tolist() == [False, True, False]
    whole = read(plan, store, ALONE)
    assert whole.features[16, "half"].shape == (3, 2, 0)


def test_a_picture_that_was_drawn_with_others_does_not_count(plan, store):
    other = Plan(plan.settings, plan.prompts, 2, Settings(n_samples=4))  # 0 to 3, then 4 and 5
    assert read(other, store, ALONE).is_there[16, "unmerged"].tolist() == [False, False, True]
