from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.data import growing
from ldm.demo import samples as module
from ldm.demo.samples import held_out_scenes, samples
from ldm.demo.scenes import is_held_out

MODEL = SimpleNamespace(
    state_dict=lambda: {"w": torch.ones(2)}, first_stage_model=SimpleNamespace(f=8)
)


def test_scenes_with_one_attribute():
    scenes = held_out_scenes(5, ("sky", "stars"))
    assert [scene.sky for scene in scenes] == ["stars"] * 5
    assert all(is_held_out(scene) for scene in scenes)
    assert held_out_scenes(3) == held_out_scenes(5)[:3]


@pytest.fixture
def drawn(monkeypatch):
    """Seeds of the pictures that were drawn; each picture has its seed as its colour."""
    seen = []

    def draw_batches(model, prompts, seeds, steps, scale, size, show):
        assert len(prompts) == len(seeds)
        for start in range(0, len(seeds), 2):
            batch = seeds[start : start + 2]
            seen.extend(batch)
            colours = torch.tensor(batch).div(127.5).sub(1).view(-1, 1, 1, 1)
            yield colours.expand(-1, 3, 8 * size, 8 * size)

    monkeypatch.setattr(module, "drawn", draw_batches)
    monkeypatch.setattr(growing, "KEPT_EVERY", 0)
    return seen


def colours(pictures):
    return pictures[:, 0, 0, 0].add(1).mul(127.5).round().tolist()


def test_what_was_drawn_is_kept(tmp_path, drawn):
    for n in (3, 2, 6):
        found = samples(MODEL, n, 5, 4.0, 2, cache_dir=str(tmp_path))
        assert found.shape == (n, 3, 16, 16)
        assert colours(found) == list(range(n))
    assert drawn == list(range(6))
    samples(MODEL, 2, 6, 4.0, 2, cache_dir=str(tmp_path))  # other steps
    samples(MODEL, 2, 5, 4.0, 2, ("sky", "stars"), str(tmp_path))
    changed = SimpleNamespace(**{**vars(MODEL), "state_dict": lambda: {"w": torch.zeros(2)}})
    samples(changed, 2, 5, 4.0, 2, cache_dir=str(tmp_path))
    assert drawn == [*range(6), 0, 1, 0, 1, 0, 1]
    assert colours(samples(MODEL, 4, 5, 4.0, 2)) == [0, 1, 2, 3]


def test_what_is_damaged_is_drawn_again(tmp_path, drawn):
    samples(MODEL, 3, 5, 4.0, 2, cache_dir=str(tmp_path))
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:200])
    assert colours(samples(MODEL, 3, 5, 4.0, 2, cache_dir=str(tmp_path))) == [0, 1, 2]
    assert drawn == [0, 1, 2, 0, 1, 2]


def test_what_another_process_kept_meanwhile_may_be_less_than_is_wanted(
    tmp_path, drawn, monkeypatch
):
    look = module.whole_array

    def late(path):
        """There is nothing yet, and two pictures a moment later."""
        monkeypatch.setattr(module, "whole_array", look)
        samples(MODEL, 2, 5, 4.0, 2, cache_dir=str(tmp_path))
        return None

    monkeypatch.setattr(module, "whole_array", late)
    assert colours(samples(MODEL, 4, 5, 4.0, 2, cache_dir=str(tmp_path))) == [0, 1, 2, 3]
    assert drawn == [0, 1, 2, 3]


def test_a_stopped_run_goes_on(tmp_path, drawn, monkeypatch):
    def stop(values):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return np.zeros((2, 16, 16, 3), np.uint8)

    with monkeypatch.context() as patched:
        patched.setattr(module, "to_pixels", stop)
        with pytest.raises(KeyboardInterrupt):
            samples(MODEL, 6, 5, 4.0, 2, cache_dir=str(tmp_path))
    assert colours(samples(MODEL, 6, 5, 4.0, 2, cache_dir=str(tmp_path)))[2:] == [2, 3, 4, 5]
    assert drawn == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
