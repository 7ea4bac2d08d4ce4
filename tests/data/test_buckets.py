"""Training batches of several picture sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.data.buckets import ResolutionBuckets
from ldm.errors import InputError
from ldm.training.data import DataModuleFromConfig


def scenes(n: int, size: int) -> dict[str, Any]:
    params = {"n_pictures": n, "size": size, "flip": False}
    return {"target": "ldm.demo.rendered.RenderedScenes", "params": params}


def buckets(batch_sizes: list[int]) -> ResolutionBuckets:
    return ResolutionBuckets([scenes(7, 16), scenes(5, 32)], batch_sizes)


def test_a_batch_has_one_size_and_an_epoch_every_full_batch() -> None:
    found = buckets([3, 2])
    torch.manual_seed(0)
    batches = found.draw_batches()
    assert len(batches) == 2 + 2
    for batch in batches:
        sizes = {found[index]["image"].shape[0] for index in batch}
        assert sizes == ({16} if len(batch) == 3 else {32})
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == 10
    assert set(seen) <= set(range(12))


def test_each_epoch_is_shuffled_anew() -> None:
    found = buckets([1, 1])
    torch.manual_seed(0)
    first, second = found.draw_batches(), found.draw_batches()
    assert first != second
    assert sorted(first) == sorted(second)
    torch.manual_seed(0)
    assert found.draw_batches() == first


def test_processes_that_take_turns_have_batches_of_one_size_at_a_time() -> None:
    found = buckets([1, 1])
    torch.manual_seed(0)
    batches = found.draw_batches(2)
    assert sorted(index for (index,) in batches) == list(range(12))
    pairs = [(a < 7, b < 7) for (a,), (b,) in zip(batches[:10:2], batches[1:10:2], strict=True)]
    assert sorted(pairs) == [(False, False)] * 2 + [(True, True)] * 3


def test_the_data_module_reads_them() -> None:
    target = "ldm.data.buckets.ResolutionBuckets"
    params = {"buckets": [scenes(4, 16), scenes(4, 32)], "batch_sizes": [4, 2]}
    data = DataModuleFromConfig(8, {"target": target, "params": params}, num_workers=0)
    data.setup()
    shapes = sorted(tuple(batch["image"].shape[:2]) for batch in data.train_dataloader())
    assert shapes == [(2, 32), (2, 32), (4, 16)]


@pytest.mark.parametrize(("sizes", "message"), [([3], "one for each"), ([3, 6], "5 pictures")])
def test_batch_sizes_that_cannot_be(sizes: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        buckets(sizes)


def test_the_demo_trains_on_two_sizes_last() -> None:
    from omegaconf import OmegaConf

    folder = Path("configs/demo")
    config = OmegaConf.merge(
        OmegaConf.load(folder / "unet.yaml"), OmegaConf.load(folder / "large_latents.yaml")
    )
    found = OmegaConf.to_container(config.data.params.train.params, resolve=True)
    assert len(found["buckets"]) == len(found["batch_sizes"]) == 2
    assert found["buckets"][0]["params"]["first_stage"]["params"]["embed_dim"] == 4
