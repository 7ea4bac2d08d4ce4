import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import __version__
from ldm.cli import txt2img
from ldm.images import load_rgb, read_settings
from ldm.modules.tome.match import nearest_in_window
from tests.tiny_models import files

PROGRAM = txt2img
SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"
FAST = ["--steps", "2", "--device", "cpu", "--dtype", "float32"]


def test_a_process_draws_a_picture_from_any_folder(tiny_checkpoint, tmp_path):
    command = [sys.executable, str(SCRIPT), "--ckpt", str(tiny_checkpoint), *FAST]
    command += ["--prompt", "a house", "--tome-ratio", "0.5", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "txt2img-samples"
    assert files(folder) == ["grid-0000.png", "samples/00000.png"]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ToMe:") for line in lines) == 1
    assert "64 -> 32 tokens" in done.stdout
    assert lines[-1] == "Pictures are in outputs/txt2img-samples"
    assert "DDIM Sampler: 100%" in done.stderr
    assert "Traceback" not in done.stderr
    settings = read_settings(folder / "samples" / "00000.png")
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a house", 7, 2)
    assert settings["tome"]["ratio"] == 0.5


def test_between_the_script_and_the_match_there_is_little(tiny_checkpoint, tmp_path, monkeypatch):
    """At most 15 frames of ours are on the stack when tokens are matched."""
    depths = []

    def counted(*args, **kwargs):
        files = [frame.filename for frame in traceback.extract_stack()]
        ours = (str(SCRIPT), str(SCRIPT.parents[1] / "ldm"))
        depths.append(sum(file.startswith(ours) for file in files))
        return nearest_in_window(*args, **kwargs)

    monkeypatch.setattr("ldm.modules.tome.merge.nearest_in_window", counted)
    flags = ["--ckpt", str(tiny_checkpoint), *FAST, "--prompt", "hills", "--tome-ratio", "0.5"]
    flags += ["--outdir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert depths
    assert max(depths) <= 15


def test_a_process_ends_with_one_line_where_the_input_is_bad(tmp_path):
    (tmp_path / "model.ckpt").write_text("just some text")
    command = [sys.executable, str(SCRIPT), "--ckpt", "model.ckpt", "--outdir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: model.ckpt is a text file, not a checkpoint\n"
    assert files(tmp_path) == ["model.ckpt"]


def test_pictures_are_numbered_on_and_reproduced(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--prompt", "a house"]
    assert run(*argv, "--n_samples", 2, "--n_iter", 2) == 0
    assert run(*argv, "--n_iter", 2, "--seed", 44, "--n_rows", 1) == 0
    numbers = [f"samples/0000{i}.png" for i in range(6)]
    assert files(tmp_path) == ["grid-0000.png", "grid-0001.png", *numbers]
    pictures = [load_rgb(tmp_path / number).astype(int) for number in numbers]
    assert [read_settings(tmp_path / n)["seed"] for n in numbers] == [42, 43, 44, 45, 44, 45]
    assert np.abs(pictures[2] - pictures[4]).max() <= 1  # drawn in other batches
    assert np.abs(pictures[0] - pictures[1]).max() > 10
    assert load_rgb(tmp_path / "grid-0000.png").shape == (38, 38, 3)
    assert load_rgb(tmp_path / "grid-0001.png").shape == (38, 20, 3)


def test_the_same_command_gives_the_same_bytes(run, tiny_checkpoint, tmp_path):
    for name in ("one", "two"):
        argv = ["--ckpt", tiny_checkpoint, *FAST, "--tome-ratio", 0.5, "--outdir", tmp_path / name]
        assert run(*argv) == 0
    one, two = ((tmp_path / name / "samples/00000.png").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_picture_for_each_line_of_a_file(run, tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hills\n# not this\n\nthe sea\na house\n")
    out = tmp_path / "out"
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", out, "--from-file", prompts]
    assert run(*argv, "--n_samples", 2, "--negative_prompt", "blurry") == 0
    drawn = [read_settings(out / f"samples/0000{i}.png")["prompt"] for i in range(3)]
    assert drawn == ["hills", "the sea", "a house"]
    assert len(files(out)) == 4


def test_two_processes_share_the_lines_of_a_file(tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hills\nthe sea\na house\n")
    launchers = {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    drawn = {}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(SCRIPT), "--ckpt", str(tiny_checkpoint), *FAST]
        command += ["--from-file", str(prompts), "--outdir", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        paths = sorted((tmp_path / name / "samples").iterdir())
        assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
        drawn[name] = [(read_settings(path)["prompt"], load_rgb(path)) for path in paths]
    assert [prompt for prompt, _ in drawn["two"]] == ["hills", "the sea", "a house"]
    for (_, picture), (_, expected) in zip(drawn["two"], drawn["one"], strict=True):
        np.testing.assert_array_equal(picture, expected)


def test_the_model_s_defaults_and_the_flags_over_them(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--outdir", tmp_path]
    assert run(*argv) == 0
    settings = read_settings(tmp_path / "samples/00000.png")
    assert (settings["H"], settings["W"], settings["steps"]) == (16, 16, 2)
    assert run(*argv, "--H", 24, "--W", 9, "--steps", 3, "--scale", 2, "--dpm_solver") == 0
    last = files(tmp_path / "samples")[-1]
    settings = read_settings(tmp_path / "samples" / last)
    assert (settings["H"], settings["W"], settings["sampler"]) == (24, 8, "dpm_solver")
    assert load_rgb(tmp_path / "samples" / last).shape == (24, 8, 3)


def test_a_second_pass(run, tiny_checkpoint, tmp_path, capsys):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--sampler", "euler_a"]
    assert run(*argv, "--hires_scale", 2, "--hires_steps", 3, "--tome-hires-ratio", 0.5) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("ToMe:")]
    assert len(lines) == 1
    assert lines[0].startswith("ToMe: second pass: grid 2x2 ratio=0.5")
    assert "256 -> 128 tokens" in lines[0]
    path = tmp_path / "samples/00000.png"
    assert load_rgb(path).shape == (32, 32, 3)
    text = Image.open(path).info["parameters"]
    assert "Size: 16x16" in text
    assert "Hires upscale: 2, Hires steps: 3, Hires upscaler: Latent" in text
    assert "Token merging ratio hr: 0.5" in text


def test_lines_with_settings_of_their_own(run, refused, tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('hills\n{"prompt": "the sea", "W": 24, "tome": {"ratio": 0.5}}\na house\n')
    out = tmp_path / "out"
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", out, "--from-file", prompts]
    assert run(*argv) == 0
    made = [read_settings(out / f"samples/0000{i}.png") for i in range(3)]
    assert [(s["prompt"], s["W"], s["seed"]) for s in made] == [
        ("hills", 16, 42),
        ("the sea", 24, 43),
        ("a house", 16, 44),
    ]
    assert [s["tome"]["ratio"] for s in made] == [None, 0.5, None]
    assert load_rgb(out / "grid-0000.png").shape == (56, 28, 3)
    prompts.write_text('hills\n{"prompt": "the sea", "tome": {"ratio": 0.9}}\n')
    assert "at most 0.75" in refused(*argv, "--outdir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('"clip_skip": 9', "clip_skip 9: this model's text encoder takes"),
        ('"C": 5', "C 5: this model's is 4"),
        ('"schedule": "karras"', "schedule karras needs one of the samplers"),
        ('"H": 16384, "hires_scale": 2', "H 32768"),
        ('"tome": {"ratio": 0.9}', "ToMe ratio=0.9"),
    ],
)
def test_a_line_that_the_model_cannot_draw_is_named_before_any_is_drawn(
    refused, tiny_checkpoint, tmp_path, setting, message
):
    lines = tmp_path / "lines.txt"
    lines.write_text('a hill\n{"prompt": "a lake", ' + setting + "}\n")
    out = tmp_path / "out"
    told = refused("--ckpt", tiny_checkpoint, "--from-file", lines, "--outdir", out)
    assert f"lines.txt, line 2: {message}" in told
    assert not out.exists()


def test_prompt_after_prompt_with_one_model(
    run, refused, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    lines = iter(["a house", "!set tome.ratio 0.4", "!set tome.ratio 0.9", "hills", "!quit"])
    monkeypatch.setattr("builtins.input", lambda question: next(lines))
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--interactive"]
    assert run(*argv) == 0
    shown = capsys.readouterr()
    assert files(tmp_path) == ["samples/00000.png", "samples/00001.png"]
    made = [read_settings(tmp_path / name) for name in files(tmp_path)]
    assert [(s["prompt"], s["tome"]["ratio"]) for s in made] == [("a house", None), ("hills", 0.4)]
    assert f"Saved {tmp_path}/samples/00001.png" in shown.out
    assert "error: ToMe ratio=0.9: method grid" in shown.err
    assert "leave out --prompt and --from-file" in refused(*argv, "--prompt", "x")


def test_what_is_saved_can_be_chosen(run, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    argv = ["--ckpt", tiny_checkpoint, *FAST]
    assert run(*argv, "--outdir", tmp_path / "a", "--skip_grid", "--no_metadata") == 0
    assert files(tmp_path / "a") == ["samples/00000.png"]
    assert Image.open(tmp_path / "a" / "samples" / "00000.png").info == {}
    assert run(*argv, "--outdir", tmp_path / "b", "--skip_save") == 0
    assert files(tmp_path / "b") == ["grid-0000.png"]
    assert f"Pictures are in {tmp_path}/b" in capsys.readouterr().out
    lines = iter(["hills", "!quit"])
    monkeypatch.setattr("builtins.input", lambda question: next(lines))
    for more in (["--skip_grid"], ["--interactive"]):
        assert run(*argv, "--outdir", tmp_path / "c", "--skip_save", *more) == 0
        assert not (tmp_path / "c").exists()
        said = capsys.readouterr().out
        assert said.splitlines()[-1] == "No picture was saved, as --skip_save says"
        assert "None" not in said


def test_flags_of_a_second_pass_that_is_not_drawn_are_named(run, tmp_path, capsys):
    flags = ["--hires_strength", 0.3, "--hires_steps", 9]
    for scale, is_idle in ((1, True), (2, False)):
        assert run("--ckpt", tmp_path / "none.ckpt", "--hires_scale", scale, *flags) == 2
        said = "no effect without a second pass (hires_scale): hires_steps, hires_strength\n"
        assert (said in capsys.readouterr().err) == is_idle


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--C", "8"], "C 8: this model's is 4"),
        (["--tome-ratio", "0.9"], "at most 0.75"),
        (["--tome-k", "4", "--tome-ratio", "0.5"], "both set the amount"),
        (["--ema"], "no EMA"),
        (["--dtype", "float16"], "float16 is for GPUs"),
        (["--config", "configs/stable-diffusion/v1-inference.yaml"], "does not fit"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_one_clear_line(
    refused, tiny_checkpoint, tmp_path, argv, message
):
    out = tmp_path / "out"
    argv = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--outdir", out, *argv]
    assert message in refused(*argv)
    assert not out.exists()


def test_a_picture_gives_its_settings_back_and_a_run_can_go_on(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path / "a", "--prompt", "hills"]
    assert run(*argv, "--tome-ratio", 0.5, "--sampler", "euler", "--n_iter", 3) == 0
    first = tmp_path / "a" / "samples"
    argv = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--dtype", "float32"]
    out = ["--outdir", tmp_path / "b", "--from_picture", first / "00002.png"]
    assert run(*argv, *out) == 0
    again = tmp_path / "b" / "samples" / "00000.png"
    np.testing.assert_array_equal(load_rgb(again), load_rgb(first / "00002.png"))
    same = ["--prompt", "hills", "--tome-ratio", 0.5, "--sampler", "euler", "--n_iter", 3]
    assert run(*argv, *FAST, *same, "--skip", 2, "--outdir", tmp_path / "c") == 0
    assert files(tmp_path / "c" / "samples") == ["00000.png"]
    rest = tmp_path / "c" / "samples" / "00000.png"
    np.testing.assert_array_equal(load_rgb(rest), load_rgb(first / "00002.png"))
    assert run(*argv, *FAST, *same, "--skip", 3, "--outdir", tmp_path / "d") == 2


def test_prompts_from_a_pipe_and_a_record_of_a_step(tiny_checkpoint, tmp_path):
    command = [sys.executable, str(SCRIPT), "--ckpt", str(tiny_checkpoint), *FAST, "--profile"]
    command += ["--from-file", "-", "--outdir", "out", "--verbose"]
    said = 'hills\n{"prompt": "the sea", "seed": 7}\n'
    done = subprocess.run(command, cwd=tmp_path, input=said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == [
        "grid-0000.png",
        "samples/00000.png",
        "samples/00001.png",
        "trace-0000.json",
    ]
    assert read_settings(tmp_path / "out/samples/00001.png")["seed"] == 7
    assert read_settings(tmp_path / "out/samples/00001.png")["version"] == __version__
    assert f"Version {__version__}, Python" in done.stdout
    trace = json.loads((tmp_path / "out/trace-0000.json").read_text(encoding="utf-8"))
    assert any("attention" in event["name"] for event in trace["traceEvents"])


def test_a_stopped_run_keeps_what_is_finished_and_says_how_to_go_on(tiny_checkpoint, tmp_path):
    command = [sys.executable, str(SCRIPT), "--ckpt", str(tiny_checkpoint), *FAST]
    process = subprocess.Popen(
        [*command, "--n_iter", "100000", "--outdir", "out"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    while not (tmp_path / "out" / "samples" / "00001.png").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    said = re.fullmatch(
        r"ended: (\d+) of 100000 pictures are in out; the same command with --skip \1 goes on",
        errors.decode().splitlines()[-1],
    )
    assert int(said[1]) in (len(files(tmp_path / "out")), len(files(tmp_path / "out")) - 1)
    assert all(load_rgb(path).any() for path in (tmp_path / "out").rglob("*.png"))
