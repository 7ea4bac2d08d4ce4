"""Pictures that the demo model draws of scenes that training never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.canvas import PictureNoise
from ldm.checkpoint.hashes import weights_key
from ldm.data.growing import change_of, grow, whole_array
from ldm.demo.rendered import STYLE, scene_of
from ldm.demo.scenes import Scene, attributes, caption
from ldm.images import to_pixels, to_unit
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion

PROMPT_SEED = 20  # of the held-out scenes; no training set is rendered from it


def held_out_scenes(n: int, only: tuple[str, str] | None = None) -> list[Scene]:
    """Scenes whose combinations of attributes training never saw.

    Args:
        n: how many.
        only: an attribute and the value that it has in all of them.
    """
    scenes = (scene_of(i, PROMPT_SEED, "held_out") for i in count())
    if only is not None:
        name, value = only
        scenes = (scene for scene in scenes if attributes(scene)[name] == value)
    return list(islice(scenes, n))


def captions_of(scenes: list[Scene]) -> list[str]:
    """A caption for each scene, in a phrasing of its own."""
    return [caption(s, np.random.default_rng((PROMPT_SEED, i))) for i, s in enumerate(scenes)]


@torch.no_grad()
def drawn(
    model: LatentDiffusion,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    scale: float,
    size: int,
    batch_size: int = 8,
    show: str | None = None,
) -> Iterator[Tensor]:
    """Sample one picture for each prompt with DDIM.

    Args:
        model: in evaluation mode.
        prompts: n of them.
        seeds: n, of the initial noise.
        steps: of the sampler.
        scale: of guidance.
        size: of the latents, a side.
        batch_size: pictures at a time.
        show: name for the progress bar; None shows none.

    Yields: pictures (batch, 3, H, W), float32 on the CPU, clamped to [-1, 1].
    """
    dtype = next(model.model.parameters()).dtype
    bar = tqdm(total=len(prompts), desc=show, disable=show is None, unit="picture")
    for start in range(0, len(prompts), batch_size):
        texts = prompts[start : start + batch_size]
        noise = PictureNoise(seeds[start : start + batch_size])
        x_T = noise((len(texts), model.channels, size, size))
        z, _ = DDIMSampler(model).sample(
            steps,
            len(texts),
            x_T.shape[1:],
            model.get_learned_conditioning(texts).to(dtype),
            x_T=x_T.to(model.device),
            verbose=False,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=model.get_learned_conditioning([""] * len(texts)).to(dtype),
        )
        first_stage = next(model.first_stage_model.parameters())
        decoded = model.decode_first_stage(z.to(first_stage.dtype))
        yield decoded.float().clamp(-1, 1).cpu()
        bar.update(len(texts))
    bar.close()


def draw(*args: Any, **kwargs: Any) -> Tensor:
    """What `drawn` yields in one piece, (n, 3, H, W)."""
    return torch.cat(list(drawn(*args, **kwargs)))


def samples(
    model: LatentDiffusion,
    n: int,
    steps: int,
    scale: float,
    size: int,
    only: tuple[str, str] | None = None,
    cache_dir: str | None = None,
) -> Tensor:
    """One picture for each caption of `held_out_scenes`, (n, 3, H, W) in [-1, 1].

    Args:
        model: the demo model.
        n: how many; each picture's noise has its number as a seed.
        steps: of the sampler.
        scale: of guidance.
        size: of the latents, a side.
        only: see `held_out_scenes`.
        cache_dir: where pictures are kept in 8 bits: what was drawn for the first scenes, also by
            a run that was stopped, is not drawn again. None keeps nothing.
    """
    prompts = captions_of(held_out_scenes(n, only))

    def after(start: int) -> Iterator[Tensor]:
        seeds = list(range(start, n))
        return drawn(model, prompts[start:], seeds, steps, scale, size, show="prompts")

    if cache_dir is None:
        return torch.cat(list(after(0)))
    what = [weights_key(model.state_dict().items()), only, STYLE, steps, scale, size]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"samples-{key}.npy"
    side = size * model.first_stage_model.f
    kept: Any = ()

    def rows(start: int) -> Iterator[np.ndarray]:
        yield from kept[start:]
        for batch in after(max(start, len(kept))):
            yield from to_pixels(batch)

    while True:  # another process may have kept fewer meanwhile
        before, found = change_of(path), whole_array(path)
        is_whole = found is not None and found.shape[1:] == (side, side, 3)
        kept = found if is_whole else np.empty((0, side, side, 3), "uint8")
        if len(kept) >= n:
            break
        grow(path, f"{key} {n}", (n, side, side, 3), np.uint8, rows, before)
    return torch.from_numpy(to_unit(np.asarray(kept[:n])))
