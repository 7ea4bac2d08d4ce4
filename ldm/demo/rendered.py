"""Rendered scenes as a training set: pictures made on demand or once into a cache file."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.growing import change_of, grow, whole_array
from ldm.demo.scenes import Scene, Split, attributes, caption, mirror, render, sample_scene
from ldm.errors import InputError
from ldm.images import to_unit
from ldm.text import read_json
from ldm.util import written_whole

STYLE = 4
"""Version of the renderer's look; a cache made by another version is made anew."""


def scene_of(index: int, seed: int, split: Split) -> Scene:
    """Returns the scene of picture `index` of the set that `seed` and `split` name."""
    return sample_scene(np.random.default_rng((seed, index, 0)), split)


def picture_of(index: int, seed: int, split: Split, size: int) -> np.ndarray:
    """Returns picture `index` of the set, uint8 (size, size, 3); the same content at every size."""
    return render(scene_of(index, seed, split), np.random.default_rng((seed, index, 1)), size)


def stacked(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures (H, W, 3) as models see them: (n, 3, H, W), float32 in [-1, 1]."""
    return torch.from_numpy(to_unit(np.stack(pictures)))


class SceneCaptions(Dataset):
    """Captions of scenes without their pictures: `{"caption": str, "scene": dict}`.

    Args:
        n_captions: how many scenes the set has; the phrasing is drawn afresh each time.
        seed: which scenes.
        split: "train", "held_out" or "all" combinations of attributes.
    """

    def __init__(self, n_captions: int, seed: int = 0, split: Split = "train") -> None:
        self.n_captions = n_captions
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        """How many captions there are."""
        return self.n_captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One caption with its scene's attributes."""
        if not 0 <= index < self.n_captions:
            raise IndexError(index)
        scene = scene_of(index, self.seed, self.split)
        rng = np.random.default_rng(torch.randint(2**31, (4,)).tolist())
        return {"caption": caption(scene, rng), "scene": attributes(scene)}


class RenderedScenes(Dataset):
    """Captioned pictures of rendered scenes.

    An item is `{first_stage_key: float32 (H, W, 3) in [-1, 1], "caption": str, "scene": dict}`.
    Pictures depend on (seed, index, split) alone; crop, flip and phrasing are drawn afresh from
    torch's generator each time.

    Args:
        n_pictures: how many pictures the set has.
        size: edge length in pixels.
        seed: which pictures; sets with different seeds share none.
        split: "train", "held_out" or "all" combinations of attributes.
        first_stage_key: the item's key for the picture.
        crop: edge length of a random crop; None keeps the whole picture.
        flip: whether to mirror half of the items, caption and attributes included.
        cache_dir: folder for a cache file of 3 size**2 bytes per picture; None draws on demand.
        n_workers: processes that fill the cache; by default one for each core.

    Attributes:
        version: changes with the renderer's look.

    Raises:
        InputError: `crop` is larger than `size`.
    """

    def __init__(
        self,
        n_pictures: int,
        size: int = 128,
        seed: int = 0,
        split: Split = "train",
        first_stage_key: str = "image",
        crop: int | None = None,
        flip: bool = True,
        cache_dir: str | None = None,
        n_workers: int | None = None,
    ) -> None:
        if crop is not None and crop > size:
            raise InputError(f"crop {crop} is larger than the pictures; give at most {size}")
        self.version = STYLE
        self.n_pictures = n_pictures
        self.size = size
        self.seed = seed
        self.split = split
        self.first_stage_key = first_stage_key
        self.crop = size if crop is None else crop
        self.flip = flip
        self._pictures = None if cache_dir is None else self._open_cache(Path(cache_dir), n_workers)

    def __len__(self) -> int:
        """How many pictures there are."""
        return self.n_pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture with its caption and its attributes."""
        if not 0 <= index < self.n_pictures:
            raise IndexError(index)
        scene = scene_of(index, self.seed, self.split)
        if self._pictures is None:
            picture = picture_of(index, self.seed, self.split, self.size)
        else:
            picture = self._pictures[index]
        rng = np.random.default_rng(torch.randint(2**31, (4,)).tolist())
        top, left = rng.integers(self.size - self.crop + 1, size=2)
        picture = picture[top : top + self.crop, left : left + self.crop]
        if self.flip and rng.random() < 0.5:
            picture, scene = picture[:, ::-1], mirror(scene)
        return {
            self.first_stage_key: picture.astype(np.float32) / 127.5 - 1.0,
            "caption": caption(scene, rng),
            "scene": attributes(scene),
        }

    def _open_cache(self, folder: Path, n_workers: int | None) -> np.ndarray:
        settings = {
            "n_pictures": self.n_pictures,
            "size": self.size,
            "seed": self.seed,
            "split": self.split,
            "style": STYLE,
        }
        stem = f"scenes_{self.split}_{self.n_pictures}x{self.size}_seed{self.seed}"
        data, label = folder / f"{stem}.npy", folder / f"{stem}.json"
        before = change_of(data)
        for other in sorted(folder.glob(f"scenes_{self.split}_*x{self.size}_seed{self.seed}.json")):
            try:
                stored = read_json(other)
            except InputError:  # damaged
                continue
            n = stored.get("n_pictures")
            is_enough = isinstance(n, int) and n >= self.n_pictures  # a longer set begins with ours
            if is_enough and {**settings, "n_pictures": n} == stored:
                pictures = whole_array(other.with_suffix(".npy"))
                if pictures is not None:
                    return pictures
        folder.mkdir(parents=True, exist_ok=True)
        label.unlink(missing_ok=True)
        self._fill(data, before, json.dumps(settings), n_workers)
        with written_whole(label, "w") as file:
            file.write(json.dumps(settings))
        return np.load(data, mmap_mode="r")

    def _fill(self, path: Path, before: int | None, settings: str, n_workers: int | None) -> None:
        """Renders every picture into `path`, which appears only when it is whole."""
        draw = partial(picture_of, seed=self.seed, split=self.split, size=self.size)

        def rows(start: int) -> Iterator[np.ndarray]:
            todo = range(start, self.n_pictures)
            pool = _worker_pool(n_workers) if len(todo) > 64 else nullcontext()
            with pool as workers:
                drawn = workers.imap(draw, todo, chunksize=16) if workers else map(draw, todo)
                total = self.n_pictures
                yield from tqdm(drawn, "rendering scenes", total, initial=start, unit="picture")

        shape = (self.n_pictures, self.size, self.size, 3)
        grow(path, settings, shape, np.uint8, rows, before)


def _worker_pool(n_workers: int | None) -> multiprocessing.pool.Pool:
    """Returns a pool whose workers use one thread each; small products are slower on several."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the worker imports numpy
    try:
        return multiprocessing.get_context("spawn").Pool(n_workers)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
