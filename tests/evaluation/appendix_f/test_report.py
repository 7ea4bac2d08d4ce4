import json
import re
import subprocess

import numpy as np
import pytest

from ldm.evaluation.appendix_f.measures import MEASURES
from ldm.evaluation.appendix_f.plan import Plan, Setting, control_setting
from ldm.evaluation.appendix_f.plots import frontier, write_plots
from ldm.evaluation.appendix_f.published import PUBLISHED, paper_rows
from ldm.evaluation.appendix_f.report import report_page
from ldm.evaluation.appendix_f.store import Store
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
  const texts = where => [...document.querySelectorAll(where)].map(cell => cell.textContent);
  const column = () => texts("#table tbody tr td:first-child");
  told.orders = [column()];
  for (const times of [1, 2]) {
    document.querySelectorAll("#table th button")[1].click();
    told.orders.push(column());
  }
  told.open = texts("#table td.open");
  told.openSpeed = document.querySelectorAll("#speedTable td.open").length;
  told.speedRanges = document.querySelectorAll("#time .speedRange").length;
  told.steps = document.querySelector("#work .frontier").getAttribute("points").split(" ").length;
  told.differences = texts("#differenceTable tbody td");
  told.equal = texts("#equalTable tbody td").slice(0, 3);
  told.titles = ["fidelityTitle", "speedHead"].map(id => view(id).textContent);
  told.colours = [...document.querySelectorAll("#legend i")].map(mark => mark.style.background);
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
            about = {"prompt": batch.pictures[0][0], "seed": batch.pictures[0][1]}
            store.add(setting, batch, [pixels], [about], [{"psnr_db": 30.0}])
    speed = {"rows": [timed(s, i) for i, s in enumerate(SETTINGS[:3])], "machine": "a card"}
    return report_page(plan, store, [], table(), speed, "a model (0123abcd), made by a test")


def timed(setting, i):
    low, high = 0.9 + 0.2 * i, 1.1 + 0.2 * i
    row = {"model": "sd1.5", "size": 512, "dtype": "float32", "setting": setting.name, "ms": 9.0}
    return {**row, "source": "", "error": "", "speedup": 1 + 0.2 * i, "range": [low, high]}


def one(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def table():
    """Rows as they come from measuring: of "half" nothing can be told, "most" has lost most."""
    rows = []
    for i, setting in enumerate(SETTINGS):
        measures = {}
        if i:
            measures = {"ssim": one(0.9 - 0.1 * i, 0.5, 1.0), "psnr_db": one(60.0 - 10 * i, 30, 61)}
        difference = {"ssim": one(-0.1, -0.2, 0.1), "psnr_db": one(-10.0, -12.0, -8.0)}
        rows.append(
            {
                "size": 16,
                "setting": setting.name,
                "family": setting.family,
                "control": setting.control,
                "tome": {"ratio": 0.5},
                "source": "",
                "saved_work": 0.2 * i,
                "saved_whole": 0.05 * i,
                "n_prompts": 2,
                "seconds": 3.0,
                "gib": 1.5,
                "measures": measures,
                "differences": {"half": difference} if i == 2 else {},
                "above_floor": ["psnr_db"] if i == 1 else [],
                "speedup": 1 + 0.2 * i,
                "speed_range": [0.9 + 0.2 * i, 1.1 + 0.2 * i],
                "equal_time": {},
            }
        )
    equal = {
        "model": "sd1.5",
        "steps": 7,
        "measures": rows[1]["measures"],
        "differences": difference,
    }
    rows[2]["equal_time"] = {"ddim": equal}
    return rows


def test_the_page_is_whole_by_itself(page):
    assert re.findall(r'(?:src|href)="', page) == []
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert [group["prompt"] for group in data["pictures"]] == ["a house </script>", "the sea"]
    naive = [row for row in data["paper"] if "appendix_f" in row["setting"]]
    assert all("second-hand" in row["table"] for row in naive)


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
    assert told["published"] == 13
    assert told["orders"][1:] == [
        ["control: random 0.5", "most", "half", "unmerged"],
        ["unmerged", "half", "most", "control: random 0.5"],
    ]
    assert told["open"] == ["50.0030.00 to 61.00"]  # nothing can be claimed of it
    assert told["openSpeed"] == 1  # as fast as without, or not
    assert told["speedRanges"] == 3
    assert told["steps"] == 3  # down, and along
    assert told["differences"] == ["most", "-10.00-12.00 to -8.00", "-0.1000-0.2000 to 0.1000"]
    assert told["equal"] == ["most", "ddim", "7"]
    assert told["titles"] == ["Fidelity (a model model)", "Speed (sd1.5 shapes; a card)"]
    assert len(told["colours"]) == len(set(told["colours"]))
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
    assert frontier(points, MEASURES["psnr_db"]) == [(3.0, 1.0), (2.0, 4.5), (0.0, 5.0)]
    assert frontier(points, MEASURES["lpips"]) == [(3.0, 1.0), (2.5, 0.5)]
    near_one = [(3.0, 1.4), (2.0, 0.7), (1.0, 1.1), (0.5, 1.2)]  # more is not better
    assert frontier(near_one, MEASURES["high_frequency_ratio"]) == near_one[:3]


def test_the_paper_has_its_thirteen_rows_and_ours_beside_them():
    assert len(PUBLISHED) == 13
    rows = table()
    rows[1] |= {"setting": "tomesd", "measures": {"frechet": one(30.0, 29.0, 31.0)}}
    found = {(row["table"][:44], row["setting"]): row for row in paper_rows(rows)}
    ours = next(row for (_, name), row in found.items() if name == "tomesd 0.5")
    assert (ours["fid"], ours["seconds"], ours["gigabytes"]) == (33.02, 1.65, 0.89)
    assert (ours["own_fid"]["mean"], ours["own_seconds"], ours["own_gib"]) == (30.0, 3.0, 1.5)
    assert ours["speedup"] == pytest.approx(1.87, abs=0.01)
    assert "own_fid" not in next(r for (_, name), r in found.items() if name == "tomesd 0.4")
    rows.append({**rows[1], "size": 512, "seconds": 9.0})
    rows.append({**rows[3], "setting": "tomesd", "tome": {"control": "random"}})
    ours = next(row for row in paper_rows(rows) if row["setting"] == "tomesd 0.5")
    assert (ours["size"], ours["own_seconds"]) == (512, 9.0)  # of their size, if it is there
