import pytest

from ldm.evaluation import visualize as visualize_tome
from ldm.images import load_rgb, read_settings
from ldm.sampling import SAMPLERS
from tests.tiny_models import files

PROGRAM = visualize_tome
FAST = ["--steps", "2", "--device", "cpu", "--dtype", "float32", "--prompt", "a house"]


def test_maps_strips_and_a_page_for_each_picture(run, tiny_checkpoint, tmp_path, capsys):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--skip_grid"]
    assert run(*argv, "--n_samples", 2, "--tome-preset", "tomesd", "--tome-ratio", "0.25") == 0
    own = [f"map-0000{i}{end}" for i in (0, 1) for end in (
        "-block00-step000.png", "-block00-step001.png", "-block00-strip.png", ".html"
    )]  # fmt: skip
    assert files(tmp_path) == [*own, "samples/00000.png", "samples/00001.png"]
    page = (tmp_path / "map-00000.html").read_text(encoding="utf-8")
    assert "64 -> 48 tokens (attn)" in page
    assert "seed 42, 2 steps of ddim" in page
    settings = read_settings(tmp_path / "map-00001-block00-step000.png")
    assert (settings["seed"], settings["tome"]["ratio"]) == (43, 0.25)
    pictures = [load_rgb(tmp_path / name) for name in own if "step000" in name]
    assert (pictures[0] != pictures[1]).any()
    assert capsys.readouterr().out.count("Open ") == 2


def test_chosen_steps_and_blocks(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--skip_grid", "--skip_save"]
    argv += ["--tome-ratio", "0.5", "--tome-apply-to", "kv", "--plms", "--scale", "1"]
    assert run(*argv, "--vis-steps", "1", "--vis-blocks", "2, 0") == 0
    assert files(tmp_path) == [
        "map-00000-block00-step001.png",
        "map-00000-block00-strip.png",
        "map-00000-block02-step001.png",
        "map-00000-block02-strip.png",
        "map-00000.html",
    ]
    assert "(kv)" in (tmp_path / "map-00000.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "flags",
    [
        ["--tome-preset", "ibtm"],
        ["--tome-preset", "hypertile", "--tome-stride", "4", "2"],
        ["--tome-preset", "toma", "--tome-stride", "4", "2"],
        ["--tome-preset", "sito"],
    ],
)
def test_methods_that_choose_otherwise(run, tiny_checkpoint, tmp_path, flags):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, *flags]
    assert run(*argv) == 0
    page = (tmp_path / "map-00000.html").read_text(encoding="utf-8")
    assert ("64 tokens, none merged" if "hypertile" in flags else "64 -> 32 tokens") in page


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_steps_are_calls_of_the_model_with_every_sampler(name, run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--tome-ratio", "0.5"]
    argv += ["--sampler", name, "--skip_grid"]
    n_calls = 3 if name in ("heun", "dpmpp_sde", "plms") else 2
    assert run(*argv, "--vis-steps", n_calls - 1) == 0
    assert f"map-00000-block00-step{n_calls - 1:03}.png" in files(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tome-ratio", "0.5", "--vis-steps", "0,2"], "--vis-steps 2: the steps of this run"),
        (
            ["--tome-ratio", "0.5", "--sampler", "heun", "--vis-steps", "3"],
            "--vis-steps 3: the steps of this",
        ),
        (["--tome-ratio", "0.5", "--vis-blocks", "99"], "--vis-blocks 99: the blocks of this"),
        (["--vis-steps", "1;2"], "--vis-steps 1;2: allowed are whole numbers"),
        (["--vis-blocks", "9" * 5000], "--vis-blocks 999"),
        (["--tome-ratio", "0.5", "--reuse_deep", "2"], "--reuse_deep 2: steps that leave blocks"),
        (["--no-tome"], "--no-tome: there would be nothing to see"),
        ([], "nothing is merged: give --tome-ratio 0.5"),
    ],
)
def test_what_cannot_be_shown_is_said(refused, tiny_checkpoint, tmp_path, flags, message):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, *flags]
    assert refused(*argv).startswith(message)
    assert files(tmp_path) == []
