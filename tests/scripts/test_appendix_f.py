import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import save_file

from ldm.cli import txt2img
from ldm.evaluation.appendix_f import program as appendix_f
from ldm.evaluation.appendix_f.draw import Experiment
from ldm.evaluation.appendix_f.networks import alexnet_layers
from ldm.evaluation.appendix_f.protocols import imagenet
from ldm.images import Picture, load_rgb, read_settings
from tests.tiny_models import tiny_config, tiny_weights, write_safetensors

ROOT = Path(__file__).parents[2]
PROGRAM = appendix_f
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


def random_alexnet(path):
    shapes = alexnet_layers().state_dict()
    save_file({f"features.{name}": 0.1 * torch.randn(t.shape) for name, t in shapes.items()}, path)
    return path


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
        *("unmerged", "control: again", "control: rounding", "control: precision"),
        *("control: none", "control: random 0.5", "control: drop 0.5"),
        *("control: 1 steps of ddim", "control: 1 steps of dpm_solver"),
        *("half", "tomesd, larger cells", "random pairs"),
    ]
    assert rows["unmerged"]["psnr_db"] == ""
    assert float(rows["control: again"]["psnr_db"]) == 100
    assert float(rows["control: rounding"]["psnr_db"]) > 80
    assert 20 < float(rows["control: precision"]["psnr_db"]) < 80
    assert float(rows["control: 1 steps of ddim"]["psnr_db"]) < 60
    assert float(rows["half"]["saved_whole"]) < float(rows["half"]["saved_work"])
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


def test_measures_are_added_to_the_pictures_that_are_there(run, argv, tmp_path):
    out, pictures = tmp_path / "out", tmp_path / "out/pictures"
    more = ["--no-controls", "--sizes", 32, "--n_prompts", 1]
    assert run(*argv, out, *more) == 0
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")}
    assert "lpips" not in table(out)["half"]
    weights = random_alexnet(tmp_path / "alexnet.safetensors")
    assert run(*argv, out, *more, "--lpips-weights", weights) == 0
    assert float(table(out)["half"]["lpips"]) > 0
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")} == before


def test_what_is_damaged_is_drawn_anew(run, argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*argv, out, "--no-controls") == 0
    first = (out / "report/table.csv").read_bytes()
    pictures = {path: load_rgb(path).tobytes() for path in (out / "pictures").rglob("*.png")}
    (out / "about.json").write_text("{")
    for path in list(pictures)[:3]:
        path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert run(*argv, out, "--no-controls") == 0
    assert "is damaged" in capsys.readouterr().err
    assert {path: load_rgb(path).tobytes() for path in pictures} == pictures
    assert (out / "report/table.csv").read_bytes() == first


def test_distances_to_pictures_that_are_gone_do_not_count(run, argv, tmp_path, monkeypatch):
    """Another machine drew the folder: its unmerged pictures are lost, or are being replaced."""
    out = tmp_path / "out"
    argv = [*argv, out, "--no-controls", "--n_prompts", 1]
    assert run(*argv) == 0
    first = (out / "report/table.csv").read_bytes()
    unmerged, half, random = (
        sorted((out / "pictures/16").glob(f"{name}-*/*.png"))
        for name in ("unmerged", "half", "random-pairs")
    )

    def draw_elsewhere():
        for path in (*unmerged, *half):
            made = read_settings(path)
            made["measures"] |= {"psnr_db": 1.0} if path in half else {}
            Picture(255 - load_rgb(path), made).save(path)

    draw_elsewhere()
    for path in unmerged:
        path.unlink()
    assert run(*argv) == 0
    assert (out / "report/table.csv").read_bytes() == first

    draw_elsewhere()
    random[0].unlink()
    add, added = Experiment._add, []

    def add_one(self, setting, *rest):
        if added:
            raise KeyboardInterrupt
        added.append(setting.name)
        add(self, setting, *rest)

    with monkeypatch.context() as stopped:
        stopped.setattr(Experiment, "_add", add_one)
        assert run(*argv) == 130
    assert added == ["unmerged"]
    random[1].unlink()
    assert run(*argv) == 0
    assert (out / "report/table.csv").read_bytes() == first


def test_a_trial_batch_tells_hours_and_disk(run, argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*argv, out, "--dry-run") == 0
    told = capsys.readouterr().out
    hours, gib = re.search(r"batch: (\S+) hours of drawing here, (\S+) GiB", told).groups()
    assert 0 < float(hours) < 1
    assert 0 < float(gib) < 0.01
    assert not out.exists()


def test_the_vae_may_be_a_file_of_its_own(run, argv, tmp_path):
    """That of a checkpoint that has none."""
    config = tiny_config()
    weights = tiny_weights(config)
    parts = ({n: t for n, t in weights.items() if n.startswith("first_") == b} for b in (0, 1))
    model, vae = (write_safetensors(tmp_path / f"{n}.safetensors", next(parts)) for n in "mv")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    argv[1] = model
    assert run(*argv, tmp_path / "out", "--vae", vae, "--dry-run") == 0


def test_the_published_protocol_has_the_published_settings(tiny_checkpoint, capsys, run, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--protocol", "tomesd", "--sizes", 16]
    argv += ["--n_prompts", 40, "--steps", 2, "--outdir", tmp_path / "out", "--dry-run"]
    assert run(*argv) == 0
    told = capsys.readouterr().out
    named = re.findall(r"^  ((?:unmerged|appendix_f|tomesd)[^:]*):", told, re.MULTILINE)
    ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert named == [
        "unmerged",
        *(f"appendix_f {ratio}" for ratio in ratios[:5]),
        *(f"tomesd {ratio}" for ratio in ratios),
    ]
    n_of_a_control = 4  # pictures of two of the 40 classes
    n_all = 12 * 80 + told.count("  control: ") * n_of_a_control
    assert f"\n{n_all} pictures," in told
    fewer = len(re.findall(r"^  control: 1 steps", told, re.MULTILINE)) * n_of_a_control
    assert f"{2 * n_all - fewer} steps in all" in told
    assert "There is no FID without --fid-weights" in told


def test_prompts_are_spread_over_the_classes_and_more_can_be_added():
    classes, _ = imagenet(1000)
    few, _ = imagenet(10)
    assert few == classes[:10]
    assert sorted(classes) == sorted(f"a photo of a {name}" for name in IMAGENET_CLASSNAMES)
    places = sorted(IMAGENET_CLASSNAMES.index(text.removeprefix("a photo of a ")) for text in few)
    assert max(b - a for a, b in pairwise([0, *places, 1000])) < 150


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


def test_another_setting_is_noticed_or_put_beside(run, refused, argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*argv, out, "--no-controls") == 0
    there = sorted(out.rglob("*.png"))
    capsys.readouterr()
    assert "scale 3.0: the pictures in" in refused(*argv, out, "--no-controls", "--scale", "3")
    (tmp_path / "prompts.txt").write_text("a house\na tree\n")
    assert "prompt 1 'a tree': the pictures in" in refused(*argv, out, "--no-controls")
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

    process = start([*argv, "--outdir", killed], stderr=subprocess.PIPE, text=True)
    wait_for_pictures(process, killed, 2)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 143
    assert f"ended: {killed} keeps what is finished; the same command goes on" in told
    process = start([*argv, "--outdir", killed], stderr=subprocess.DEVNULL)
    wait_for_pictures(process, killed, 5)
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
        (["--n_seeds", "90000"], "--n_seeds 90000: "),
        (["--sizes", "16392"], "--sizes 16392: allowed are multiples of 8 from 8 to 16384"),
        (["--seed", "-1"], "--seed -1: allowed is 0 or more"),
        (["--speed", "sdxl"], "--speed sdxl: allowed is own"),
        (["--fid-weights", __file__], "--fid-weights: FID needs --fid-reference, too"),
        (["--fid-reference", "."], "--fid-reference: FID needs --fid-weights, too"),
        (["--table-only"], "--table-only: there are no pictures in"),
        (["--fid-weights", "nowhere.pth"], "--fid-weights nowhere.pth: there is no such file"),
    ],
)
def test_what_cannot_be_done_is_said(refused, argv, tmp_path, flags, message):
    out = tmp_path / "out"
    assert refused(*argv, out, *flags).startswith(message)
    assert not out.exists()
