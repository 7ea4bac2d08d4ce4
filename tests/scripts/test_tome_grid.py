import json

import pytest

from ldm.evaluation import tome_grid
from ldm.images import load_rgb, read_settings
from tests.tiny_models import files

PROGRAM = tome_grid
FAST = ["--steps", "2", "--device", "cpu", "--dtype", "float32", "--prompt", "a house"]


def test_ratios_and_presets_beside_the_picture_without_merging(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--n_samples", 2]
    argv += ["--ratios", "0,0.1,0.75", "--presets", "todo,trim_context"]
    assert run(*argv) == 0
    samples = [f"samples/{i:05}.png" for i in range(10)]
    assert files(tmp_path) == ["grid-0000.json", "grid-0000.png", *samples]
    result = json.loads((tmp_path / "grid-0000.json").read_text(encoding="utf-8"))
    names = ["no merging", "ratio 0.1", "ratio 0.75", "todo", "trim_context"]
    assert [column["name"] for column in result["columns"]] == names
    off, little, much, todo, _ = result["columns"]
    assert off["report"] == "ToMe: off"
    assert off["pictures"] == []
    assert all(0 < column["seconds_per_picture"] < 60 for column in result["columns"])
    assert "64 -> 16 tokens" in todo["report"]
    for near, far in zip(little["pictures"], much["pictures"], strict=True):
        assert 15 < far["psnr_db"] < near["psnr_db"] < 100
        assert 0 < far["ssim"] < near["ssim"] < 1
    assert [picture["seed"] for picture in result["pictures"]] == [42, 43]
    grid = load_rgb(tmp_path / "grid-0000.png")
    assert grid.shape[1] == 5 * (256 + 2) + 2
    assert grid.shape[0] > 2 * 256
    # the samples are those of txt2img: column after column
    assert read_settings(tmp_path / samples[2])["tome"]["ratio"] == 0.1
    assert (load_rgb(tmp_path / samples[0]) != load_rgb(tmp_path / samples[4])).any()


def test_a_flag_holds_for_all_columns(run, tiny_checkpoint, tmp_path):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, "--skip_grid", "--skip_save"]
    assert run(*argv, "--presets", "tomesd,balanced", "--tome-ratio", "0.25") == 0
    assert files(tmp_path) == ["grid-0000.json"]
    _, *columns = json.loads((tmp_path / "grid-0000.json").read_text())["columns"]
    assert [column["tome"]["ratio"] for column in columns] == [0.25, 0.25]
    assert [column["tome"]["apply_to"] for column in columns] == [["attn"], ["kv"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-tome"], "--no-tome: there would be nothing to compare"),
        (["--ratios", "0"], "--ratios 0: there would be nothing to compare"),
        (["--ratios", "0.5", "--tome-ratio", "0.3"], "--ratios 0.5: leave out --tome-ratio"),
        (["--ratios", "0.5,1.5"], "--tome-ratio 1.5: must be auto or a number"),
        (["--ratios", "0.5,0.9"], "ToMe ratio=0.9: method grid"),
        (["--n_iter", "400"], "--n_samples 1, --n_iter 400: with 4 columns there would be more"),
        (["--presets", "fast,configs/tome/fast.yaml"], "--presets configs/tome/fast.yaml: another"),
        (["--presets", "nonsense"], "there is no ToMe preset 'nonsense'"),
    ],
)
def test_what_cannot_be_compared_is_said(refused, tiny_checkpoint, tmp_path, flags, message):
    argv = ["--ckpt", tiny_checkpoint, *FAST, "--outdir", tmp_path, *flags]
    assert refused(*argv).startswith(message)
    assert files(tmp_path) == []
