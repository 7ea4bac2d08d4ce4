import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from ldm.cli import txt2img
from ldm.images import load_rgb, read_settings
from scripts import appendix_f

ROOT = Path(__file__).parents[2]
FAST = [
    "--steps",
    "2",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--sampler",
    "ddim",
    "--sizes",
    "16",
]
SETTINGS = """
half: {ratio: 0.5}
tomesd, larger cells: {preset: tomesd, stride: [4, 4], ratio: 0.9}
random pairs: {control: random, ratio: 0.25}
"""


@pytest.fixture
def run(run_program):
    return partial(run_program, appendix_f)


@pytest.fixture
def argv(tiny_checkpoint, tmp_path):
    """Arguments of a small run, whose results go to a folder that is yet to be named."""
    (tmp_path / "prompts.txt").write_text("a house\nthe sea\n")
    (tmp_path / "mine.yaml").write_text(SETTINGS)
    return [
        *("--ckpt", tiny_checkpoint, *FAST, "--from-file", tmp_path / "prompts.txt"),
        *("--n_seeds", 2, "--settings", tmp_path / "mine.yaml", "--speed", "", "--outdir"),
    ]


def table(folder):
    with (folder / "report/table.csv").open(encoding="utf-8") as file:
        return {row["setting"]: row for row in csv.DictReader(file)}


def start(argv, n_processes=1, **options):
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher += [str(n_processes)]
    return subprocess.Popen(
        [*launcher, str(ROOT / "scripts/appendix_f.py"), *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_sweep_measures_every_setting(run, argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*argv, out, "--against", "half") == 0
    rows = table(out)
    assert list(rows) == [
        *("unmerged", "control: again", "control: rounding", "control: none"),
        *("control: random 0.5", "control: drop 0.5"),
        *("half", "tomesd, larger cells", "random pairs"),
    ]
    assert rows["unmerged"]["psnr_db"] == ""
    assert float(rows["control: again"]["psnr_db"]) == 100
    assert float(rows["control: rounding"]["psnr_db"]) > 80
    half, random = (float(rows[name]["psnr_db"]) for name in ("half", "random pairs"))
    assert 10 < half < 80
    assert rows["half"]["saved_work"] != rows["random pairs"]["saved_work"]
    difference = float(rows["random pairs"]["psnr_db minus that of half"])
    assert difference == pytest.approx(random - half)
    low, high = (float(rows["half"][f"psnr_db {end}"]) for end in ("low", "high"))
    assert low <= half <= high
    assert rows["half"]["n_prompts"] == "2"
    assert "mine.yaml" in rows["half"]["source"]
    with (out / "report/pictures.csv").open(encoding="utf-8") as file:
        pictures = list(csv.DictReader(file))
    assert [p["seed"] for p in pictures if p["setting"] == "half"] == ["42", "43", "44", "45"]
    document = json.loads((out / "report/table.json").read_text())
    assert [row["setting"] for row in document["table"]] == list(rows)
    assert "a house" in (out / "report/index.html").read_text(encoding="utf-8")
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    assert run(*argv, out) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")} == before


def test_the_pictures_are_those_of_txt2img(
    run, run_program, argv, tiny_checkpoint, tmp_path, capsys
):
    out, other = tmp_path / "out", tmp_path / "txt2img"
    assert run(*argv, out, "--no-controls") == 0
    capsys.readouterr()
    assert run(*argv, out, "--no-controls", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("  tomesd, larger cells: "))
    command = line.split(": ", 1)[1].replace("PROMPTS.txt", str(tmp_path / "prompts.txt")).split()
    assert command[:2] == ["python", "scripts/txt2img.py"]
    more = ["--device", "cpu", "--dtype", "float32", "--outdir", other]
    assert run_program(txt2img, *command[2:], *more) == 0
    (folder,) = (out / "pictures/16").glob("tomesd-*")
    for i in range(4):
        ours, theirs = folder / f"{i:05}.png", other / f"samples/{i:05}.png"
        assert (load_rgb(ours) == load_rgb(theirs)).all()
        assert read_settings(ours)["tome"] == read_settings(theirs)["tome"]


def test_another_setting_is_noticed_or_put_beside(run, argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*argv, out, "--no-controls") == 0
    there = sorted(out.rglob("*.png"))
    capsys.readouterr()
    assert run(*argv, out, "--no-controls", "--scale", "3") == 2
    assert "scale 3.0: the pictures in" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a house\na tree\n")
    assert run(*argv, out, "--no-controls") == 2
    assert "prompt 1 'a tree': the pictures in" in capsys.readouterr().err
    assert sorted(out.rglob("*.png")) == there
    (tmp_path / "prompts.txt").write_text("a house\nthe sea\n")
    first = table(out)
    (tmp_path / "mine.yaml").write_text(
        SETTINGS.replace("half: {ratio: 0.5}", "half: {ratio: 0.7}")
    )
    assert run(*argv, out, "--no-controls") == 0
    second = table(out)
    assert len(list((out / "pictures/16").glob("half-*"))) == 2
    assert second["half"]["key"] != first["half"]["key"]
    assert second["half"]["psnr_db"] != first["half"]["psnr_db"]
    assert second["tomesd, larger cells"]["psnr_db"] == first["tomesd, larger cells"]["psnr_db"]


def test_processes_and_kills_do_not_change_the_table(argv, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = [*argv[:-1], "--no-controls"]
    assert start([*argv, "--outdir", whole], n_processes=2).wait(timeout=900) == 0

    process = start([*argv, "--outdir", killed], stderr=subprocess.DEVNULL)
    wait_for_pictures(process, killed, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start([*argv, "--outdir", killed]).wait(timeout=900) == 0
    texts = [(folder / "report/table.csv").read_bytes() for folder in (whole, killed)]
    assert texts[0] == texts[1]
    assert not list(killed.rglob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists children")
def test_one_of_four_processes_is_killed(argv, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start([*argv, whole]).wait(timeout=900) == 0

    launcher = start([*argv, killed], n_processes=4, stderr=subprocess.DEVNULL)
    wait_for_pictures(launcher, killed, 6)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 4
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launcher.wait(timeout=300) != 0
    there = {path: path.stat().st_mtime_ns for path in killed.rglob("*.png")}
    assert 6 <= len(there) < len(list(whole.rglob("*.png")))

    assert start([*argv, killed], n_processes=4).wait(timeout=900) == 0
    assert (killed / "report/table.csv").read_bytes() == (whole / "report/table.csv").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in there} == there


def wait_for_pictures(process, folder, n):
    end = time.monotonic() + 600
    while len(list(folder.rglob("*.png"))) < n and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratios", "1.5"], "--ratios 1.5: allowed are numbers above 0 and below 1"),
        (["--presets", "nonsense"], "there is no ToMe preset 'nonsense'"),
        (["--against", "nonsense"], "--against nonsense: the settings are unmerged"),
        (["--sizes", "20"], "--sizes 20: allowed are multiples of 8"),
        (["--n_seeds", "0"], "--n_seeds 0: allowed is at least 1"),
        (["--seed", "-1"], "--seed -1: allowed is 0 or more"),
        (["--speed", "sdxl"], "--speed sdxl: allowed is own"),
        (["--fid-weights", "nowhere.pth"], "--fid-weights nowhere.pth: there is no such file"),
    ],
)
def test_what_cannot_be_done_is_said(run, argv, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert run(*argv, out, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not out.exists()
