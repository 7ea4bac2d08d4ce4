"""Pictures encoded once by a trained first stage, so that diffusion training need not do it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.growing import change_of, grow, whole_array
from ldm.device import choose_device, choose_dtype
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.util import instantiate_from_config

N_COMPARED = 16  # pictures that are read twice, to see whether they vary


class EncodedPictures(Dataset):
    """Latents and captions of another data set's pictures.

    An item is the inner data set's item with ``image`` replaced by ``latent``: the posterior's
    mean times ``scale_factor``, (C, h, w) float32.

    Args:
        pictures: ``target``/``params`` of the inner data set; its pictures must not vary from
            one reading to the next (no random crop or flip), its captions may. A ``version`` of
            its own, if it has one, tells when they are others.
        first_stage: ``target``/``params`` of the trained autoencoder.
        weights: safetensors file of the first stage, names below ``first_stage_model.``.
        scale_factor: the diffusion model's.
        cache_dir: where the latents are kept, float16; a stopped encoding is gone on with. They
            are computed in bfloat16 where that is fast, else in float32.
        image_key: where the inner item holds its picture, (H, W, 3) in [-1, 1].
        batch_size: pictures encoded at a time.
    """

    def __init__(
        self,
        pictures: dict[str, Any],
        first_stage: dict[str, Any],
        weights: str,
        scale_factor: float,
        cache_dir: str,
        image_key: str = "image",
        batch_size: int = 16,
    ) -> None:
        if not Path(weights).is_file():
            raise InputError(f"weights {weights!r}: no such file; train the first stage first")
        self.pictures = instantiate_from_config(pictures, Dataset)
        self.scale_factor = scale_factor
        self.image_key = image_key
        version = getattr(self.pictures, "version", None)
        settings = json.dumps([pictures, version, first_stage], sort_keys=True).encode()
        digest = hashlib.sha256(settings + Path(weights).read_bytes()).hexdigest()[:16]
        path = Path(cache_dir) / f"latents-{digest}.npy"
        before = change_of(path)
        latents = _opened(path, len(self.pictures))
        if latents is None:
            self._encode(path, before, first_stage, weights, batch_size)
            latents = _opened(path, len(self.pictures))
            assert latents is not None, "just written"
        self.latents = latents

    @torch.no_grad()
    def _encode(
        self,
        path: Path,
        before: int | None,
        config: dict[str, Any],
        weights: str,
        batch_size: int,
    ) -> None:
        from safetensors.torch import load_file

        device = choose_device()
        is_fast = choose_dtype("auto", device) != torch.float32
        model = instantiate_from_config(config, torch.nn.Module).eval()
        model = model.to(device, memory_format=torch.channels_last)
        prefix = "first_stage_model."
        state = {k.removeprefix(prefix): v.float() for k, v in load_file(weights).items()}
        model.load_state_dict(state)
        n = len(self.pictures)
        if n == 0:
            raise InputError("the data set of pictures to encode is empty")
        for i in range(min(n, N_COMPARED)):
            if not np.array_equal(*(self.pictures[i][self.image_key] for _ in range(2))):
                raise InputError(
                    "the pictures to encode vary from one reading to the next, and captions would "
                    "not be theirs: leave out their random flip and crop (flip: false)"
                )

        def encode(start: int, stop: int) -> np.ndarray:
            batch = [self.pictures[i][self.image_key] for i in range(start, min(stop, n))]
            # a view whose memory is channels last, as the model's: a third faster
            x = rearrange(torch.from_numpy(np.stack(batch)), "b h w c -> b c h w")
            with torch.autocast(device.type, torch.bfloat16, enabled=is_fast):
                return model.encode(x.to(device)).mode().float().cpu().contiguous().numpy()

        def rows(start: int) -> Iterator[np.ndarray]:
            for first in tqdm(range(start, n, batch_size), desc="Encoding pictures"):
                yield from encode(first, first + batch_size)

        with all_threads():
            grow(path, path.name, (n, *encode(0, 1).shape[1:]), np.float16, rows, before)

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One latent with what belongs to it."""
        item = {k: v for k, v in self.pictures[index].items() if k != self.image_key}
        latent = self.latents[index].astype(np.float32) * self.scale_factor
        return {**item, "latent": torch.from_numpy(latent)}


@contextmanager
def all_threads() -> Iterator[None]:
    """Compute with the threads of all processes that torchrun has started, which wait meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(
        min(before * Process.from_environment().n_processes, max(os.cpu_count() or 1, before))
    )
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _opened(path: Path, n_pictures: int) -> np.ndarray | None:
    """The latents that a file keeps of so many pictures; None without, or where it is damaged."""
    latents = whole_array(path)
    is_whole = latents is not None and latents.ndim == 4 and len(latents) == n_pictures
    return latents if is_whole else None
