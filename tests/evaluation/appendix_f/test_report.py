import json
import re
import subprocess

import numpy as np
import pytest
import torch

from ldm.evaluation.appendix_f.measures import encode
from ldm.evaluation.appendix_f.metrics import Estimate
from ldm.evaluation.appendix_f.plan import Plan, Setting, control_setting
from ldm.evaluation.appendix_f.plots import frontier, write_plots
from ldm.evaluation.appendix_f.report import report_page
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.appendix_f.summary import Entry, table_json
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings
from tests.browser import chromium

SETTINGS = (
    Setting("unmerged"),
    Setting("half", ToMeConfig(ratio=0.5), family="grid"),
    Setting("most", ToMeConfig(ratio=0.75), family="grid"),
    control_setting("random"),
)
# Moves the controls as a user would, and notes what happens; errors are collected from the start.
LISTEN = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
document.addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
</script>"""
USE = """<script>
addEventListener("load", () => {
  const view = id => document.getElementById(id), told = {};
  const set = (id, value) => {
    view(id).value = value;
    view(id).dispatchEvent(new Event("input"));
    view(id).dispatchEvent(new Event("change"));
  };
  const wipe = () => getComputedStyle(view("top")).clipPath;
  told.wipes = [wipe()];
  set("wipe", 20);
  told.wipes.push(wipe());
  set("zoom", 4);
  told.zoom = view("left").style.transform;
  told.names = [view("rightName").textContent];
  view("strip").querySelectorAll("button")[1].click();
  told.names.push(view("rightName").textContent);
  told.dots = [];
  for (const option of view("measure").options) {
    set("measure", option.value);
    told.dots.push(document.querySelectorAll("#work circle").length);
  }
  told.rows = document.querySelectorAll("#table tbody tr").length;
  told.published = document.querySelectorAll("#publishedTable tbody tr").length;
  told.prompt = view("prompt").options[0].textContent;
  told.pictures = [...document.images].every(image => image.complete && image.naturalWidth > 0);
  told.requests = performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:"));
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  told.errors = errors;
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify(told);
  document.body.append(out);
});
</script>"""


@pytest.fixture
def page(tmp_path):
    """A report of two prompts and four settings, with made-up measures."""
    plan = Plan({16: SETTINGS}, ("a house </script>", "the sea"), 1, Settings())
    store = Store(tmp_path / "out")
    rng = np.random.default_rng(0)
    for batch in plan.batches():
        for setting in SETTINGS:
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            row = {"psnr_db": 30.0, "features": encode(torch.zeros(2))}
            store.add(setting, batch, [pixels], [{"seed": batch.first}], [row])
    return report_page(plan, store, table(), {}, "made by a test")


def table():
    entries = [
        Entry(16, s, 0.2 * i, 2, {"ssim": Estimate(0.9 - 0.1 * i, 0.5, 1.0)} if i else {})
        for i, s in enumerate(SETTINGS)
    ]
    for entry in entries[1:]:
        entry.estimates["psnr_db"] = Estimate(40 - 10 * entry.saved_work, 30.0, 41.0)
    return [{**row, "speedup": 1 + row["saved_work"]} for row in table_json(entries)]


def test_the_page_is_whole_by_itself(page):
    assert re.findall(r'(?:src|href)="', page) == []
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert [group["prompt"] for group in data["pictures"]] == ["a house </script>", "the sea"]
    assert all(
        "second-hand" in row["source"] for row in data["published"] if "naive" in row["setting"]
    )


@pytest.mark.parametrize("width", [1100, 500])
def test_the_page_works_in_a_browser(page, tmp_path, width):
    path = tmp_path / "page.html"
    path.write_text(page.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{USE}</body>"))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1])
    assert told["wipes"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 20%)"]
    assert told["zoom"] == "translate(-150%, -150%) scale(4)"
    assert told["names"] == ["half", "most"]
    assert told["dots"] == [3, 3]
    assert told["rows"] == 4
    assert told["published"] == 10
    assert told["prompt"] == "a house </script> (16x16, seed 42)".replace("</", "&lt;/").replace(
        "t>", "t&gt;"
    )
    assert told["pictures"]
    assert told["requests"] == []
    assert told["overflow"] <= 0
    assert told["errors"] == []


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = write_plots(tmp_path, table())
    assert path.name == "psnr_db-16.png"
    assert path.stat().st_size > 5000
    assert [p.name for p in tmp_path.iterdir()] == ["psnr_db-16.png"]


def test_the_frontier_has_what_no_other_point_beats():
    points = [(0.0, 5.0), (1.0, 4.0), (1.0, 3.0), (2.0, 4.5), (3.0, 1.0), (2.5, 0.5)]
    assert frontier(points) == [(3.0, 1.0), (2.0, 4.5), (0.0, 5.0)]
