"""Which pictures a process reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.training.data import DataModuleFromConfig
from ldm.training.order import dealt_out
from tests.training.toy import pictures, toy_config


@pytest.mark.parametrize(("n", "n_batches"), [(3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (9, 2)])
def test_two_processes_validate_with_each_picture_once(
    n: int, n_batches: int, tmp_path: Path
) -> None:
    params = toy_config(pictures(tmp_path / "pictures", n))["data"]["params"]
    params["validation"]["params"]["flip"] = False
    captions = []
    for rank in range(2):
        data = DataModuleFromConfig(**params)
        data.setup()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches = list(data.val_dataloader())
        assert len(batches) == len(data.val_dataloader()) == n_batches
        captions += [caption for batch in batches for caption in batch["caption"]]
    assert sorted(captions) == [f"picture {i}" for i in range(n)]


def test_one_process_has_full_batches_and_a_rest() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    assert dealt_out(order, 2, 0, 1) == [[4, 2], [0, 1], [3]]
    assert dealt_out(order[:4], 2, 0, 1) == [[4, 2], [0, 1]]
    assert dealt_out(order[:1], 2, 0, 1) == [[4]]


def test_of_fewer_pictures_than_processes_each_reads_all() -> None:
    assert [dealt_out(torch.arange(3), 2, rank, 4) for rank in range(4)] == [[[0, 1], [2]]] * 4
