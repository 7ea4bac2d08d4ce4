import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import img2img
from ldm.images import load_rgb, read_settings

PROGRAM = img2img
SCRIPT = Path(__file__).parents[2] / "scripts" / "img2img.py"
FAST = ["--steps", "4", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path)
    return path


def test_a_process_redraws_a_photograph(tiny_checkpoint, photograph, tmp_path):
    command = [sys.executable, str(SCRIPT), "--ckpt", str(tiny_checkpoint), *FAST]
    command += ["--init-img", "photo.jpg", "--prompt", "snow", "--tome-ratio", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "picture of 90x60 is drawn at 24x16" in done.stdout
    assert done.stdout.splitlines()[-1] == "Pictures are in outputs/img2img-samples"
    folder = tmp_path / "outputs" / "img2img-samples"
    assert load_rgb(folder / "samples" / "00000.png").shape == (16, 24, 3)
    assert (folder / "grid-0000.png").exists()
    settings = read_settings(folder / "samples" / "00000.png")
    assert (settings["strength"], settings["init_img"]) == (0.75, "photo.jpg")
    text = Image.open(folder / "samples" / "00000.png").info["parameters"]
    assert "Denoising strength: 0.75" in text
    assert "Token merging ratio: 0.5" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--init-img"),
        (["--init-img", "missing.png"], "missing.png: there is no such file"),
        (["--init-img", "text.png"], "text.png: not a picture"),
        (["--init-img", "photo.jpg", "--strength", "1.5"], "strength 1.5: allowed is 0 to 1"),
    ],
)
def test_bad_input_is_one_clear_line(refused, photograph, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("text")
    assert message in refused(*argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg", "text.png"]
