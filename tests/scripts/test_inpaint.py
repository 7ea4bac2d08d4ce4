import numpy as np
import pytest
from PIL import Image

from ldm.cli import inpaint
from ldm.images import load_rgb, read_settings

PROGRAM = inpaint
FAST = ["--steps", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def pairs(tmp_path):
    """A folder of two pictures of different shapes and their masks."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a", (16, 24)), ("b", (16, 16))):
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        mask = np.zeros(shape, np.uint8)
        mask[4:12, 4:12] = 255
        Image.fromarray(picture).save(folder / f"{name}.png")
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return folder


def is_outside_unchanged(result, picture):
    drawn, original = load_rgb(result), load_rgb(picture)
    outside = np.ones(original.shape[:2], bool)
    outside[4:12, 4:12] = False
    same = (drawn == original).all(axis=2)
    return same[outside].all() and not same[~outside].all()


@pytest.mark.parametrize("kind", ["tiny_checkpoint", "tiny_inpainting_checkpoint"])
def test_one_picture(run, request, kind, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--ckpt", request.getfixturevalue(kind), *FAST, "--outdir", out]
    argv += ["--init-img", pairs / "a.png", "--mask", pairs / "a_mask.png", "--prompt", "a boat"]
    assert run(*argv, "--n_samples", 2, "--tome-ratio", 0.5) == 0
    for i in range(2):
        assert is_outside_unchanged(out / f"samples/0000{i}.png", pairs / "a.png")
    assert (out / "grid-0000.png").exists()
    settings = read_settings(out / "samples/00001.png")
    assert (settings["prompt"], settings["mask"]) == ("a boat", str(pairs / "a_mask.png"))
    assert "strength" not in settings
    shown = capsys.readouterr().out
    assert shown.count("ToMe:") == shown.count("The mask ") == 1
    assert shown.splitlines()[-1] == f"Pictures are in {out}"


def test_a_folder_of_pairs_as_upstream(run, tiny_checkpoint, pairs, tmp_path):
    out = tmp_path / "out"
    assert run("--ckpt", tiny_checkpoint, *FAST, "--indir", pairs, "--outdir", out) == 0
    assert sorted(path.name for path in out.rglob("*")) == ["a.png", "b.png"]
    for name in ("a.png", "b.png"):
        assert is_outside_unchanged(out / name, pairs / name)
        assert read_settings(out / name)["prompt"] == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --init-img and --mask, or --indir"),
        (["--init-img", "pairs/a.png"], "give --init-img and --mask, or --indir"),
        (["--indir", "pairs", "--mask", "m.png"], "--indir goes without --init-img and --mask"),
        (["--indir", "pairs", "--skip_save"], "without --profile and --skip_save"),
        (["--indir", "pairs", "--outdir", "pairs"], "the results would replace the pictures"),
        (["--indir", "pairs", "--n_samples", "2"], "leave --n_samples and --n_iter 1"),
        (["--indir", "empty"], "there is no x_mask.png in it"),
        (["--indir", "nowhere"], "there is no x_mask.png in it"),
        (["--init-img", "pairs/a.png", "--mask", "pairs/b_mask.png"], "make them one size"),
        (["--init-img", "text.png", "--mask", "pairs/a_mask.png"], "text.png: not a picture"),
        (["--init-img", "pairs/a.png", "--mask", "text.png"], "text.png: not a picture"),
    ],
)
def test_bad_input_is_one_clear_line(refused, pairs, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(*argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_without_its_mask_s_partner_is_named(refused, pairs, tmp_path):
    (pairs / "a.png").unlink()
    assert "a.png: there is no such file" in refused("--indir", pairs, "--outdir", tmp_path / "out")
