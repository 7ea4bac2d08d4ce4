import errno
import os
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.data.growing import grow
from ldm.data.latents import EncodedPictures
from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config

PICTURES = {
    "target": "ldm.demo.rendered.RenderedScenes",
    "params": {"n_pictures": 5, "size": 16, "seed": 3, "flip": False},
}
DDCONFIG = {
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": DDCONFIG,
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(**FIRST_STAGE["params"])
    path = tmp_path / "first_stage.safetensors"
    save_file({f"first_stage_model.{k}": v for k, v in model.state_dict().items()}, path)
    return model.eval(), str(path)


@torch.no_grad()
def test_items_are_scaled_means_with_captions(weights, tmp_path):
    model, path = weights
    cache = tmp_path / "cache"
    data = EncodedPictures(PICTURES, FIRST_STAGE, path, 0.5, str(cache), batch_size=2)
    assert len(data) == 5
    picture = torch.from_numpy(instantiate_from_config(PICTURES)[4]["image"]).permute(2, 0, 1)[None]
    expected = 0.5 * model.encode(picture).mode()[0]
    torch.testing.assert_close(data[4]["latent"], expected, atol=2e-2, rtol=2e-2)  # bfloat16
    assert data[4]["caption"]
    assert "image" not in data[4]
    (file,) = cache.iterdir()  # nothing unfinished is left
    written = file.stat().st_mtime_ns
    EncodedPictures(PICTURES, FIRST_STAGE, path, 0.5, str(cache))
    assert file.stat().st_mtime_ns == written
    whole = file.read_bytes()
    file.write_bytes(whole[:150])  # damaged: made again
    EncodedPictures(PICTURES, FIRST_STAGE, path, 0.5, str(cache), batch_size=2)
    assert file.read_bytes() == whole


def test_other_pictures_have_another_cache(weights, tmp_path):
    _, path = weights
    for seed in (3, 4):
        pictures = {**PICTURES, "params": {**PICTURES["params"], "seed": seed}}
        EncodedPictures(pictures, FIRST_STAGE, path, 1.0, str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_look_of_the_renderer_has_another_cache(weights, tmp_path, monkeypatch):
    _, path = weights
    for style in (1, 2):
        monkeypatch.setattr("ldm.demo.rendered.STYLE", style)
        EncodedPictures(PICTURES, FIRST_STAGE, path, 1.0, str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_pictures_that_vary_are_refused(weights, tmp_path):
    """Their latents would be of one flip, and their captions of another."""
    params = {key: value for key, value in PICTURES["params"].items() if key != "flip"}
    with pytest.raises(InputError, match=r"vary from one reading .*\(flip: false\)"):
        EncodedPictures({**PICTURES, "params": params}, FIRST_STAGE, weights[1], 1.0, str(tmp_path))


def test_a_damaged_note_of_how_far_it_is_begins_anew(tmp_path):
    def stop(start):
        yield np.zeros(2)
        raise KeyboardInterrupt

    path = tmp_path / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        grow(path, "s", (3, 2), np.float32, stop)
    path.with_name("a.npy.count").write_text('{"done": ')
    grow(path, "s", (3, 2), np.float32, lambda start: (np.full(2, i) for i in range(start, 3)))
    assert np.load(path)[:, 0].tolist() == [0, 1, 2]


def test_missing_weights(tmp_path):
    with pytest.raises(InputError, match="train the first stage first"):
        EncodedPictures(PICTURES, FIRST_STAGE, "none.safetensors", 1.0, str(tmp_path))


def test_of_two_processes_one_encodes(weights, tmp_path, monkeypatch):
    _, path = weights
    n_encoded = []
    encode = AutoencoderKL.encode

    def counted(self, x):
        n_encoded.append(len(x))
        time.sleep(0.05)
        return encode(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    threads = [
        threading.Thread(
            target=EncodedPictures, args=(PICTURES, FIRST_STAGE, path, 1.0, str(tmp_path / "c"))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n_encoded) == [1, 1, 5]  # each looked at one picture's shape
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_full_disk_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    """A memory map of a file without room would end the process with SIGBUS."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    rows = pytest.fail
    with pytest.raises(InputError, match=r"a\.npy needs 0\.0 GB: No space left on device"):
        grow(tmp_path / "a.npy", "settings", (2, 3), "float16", rows)
    assert not any(tmp_path.iterdir())
