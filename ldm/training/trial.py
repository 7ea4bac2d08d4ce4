"""One picture through the model before the run begins: do data, model and loss fit together?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from ldm.errors import InputError, OutOfMemory, escaped, is_out_of_memory
from ldm.training.data import DataModuleFromConfig
from ldm.training.module import Training
from ldm.training.order import SeededItems, seeded
from ldm.training.trainer import LESS_TO_TRAIN

NAMES = {"train": "train", "validation": "val", "test": "test"}


@contextmanager
def blamed_on(place: str) -> Iterator[None]:
    """Say of any error inside that this part of the configuration is at fault.

    Raises:
        InputError: there was one.
        OutOfMemory: it was too little memory.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(LESS_TO_TRAIN) from None
        reason = escaped(" ".join(str(error).split()), 300)
        raise InputError(f"{place}: {type(error).__name__}: {reason}") from error


def logged_names(training: Training, data: DataModuleFromConfig, seed: int) -> set[str]:
    """Names of the values that a run logs, found with the first item of each data set.

    Nothing of the model changes, and no generator moves.

    Raises:
        InputError: a data set cannot be read, or the model cannot take what it gives.
    """
    names = set()
    modes = {module: module.training for module in training.modules()}
    training.eval()
    try:
        with seeded(seed), torch.no_grad():
            for split, short in NAMES.items():
                dataset = data.datasets.get(split)
                if dataset is not None:
                    names |= {f"{short}/{name}" for name in _terms(training, dataset, split, seed)}
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return names


def _terms(training: Training, dataset: Any, split: str, seed: int) -> dict[str, Any]:
    with blamed_on(f"data.params.{split}"):
        if isinstance(dataset, IterableDataset):
            item = next(iter(dataset))
        elif len(dataset) == 0:
            raise InputError(f"data.params.{split}: the data set is empty")
        else:
            item = SeededItems(dataset, seed)[0]
        batch = default_collate([item])
    with blamed_on(f"the model cannot take what data.params.{split} gives"):
        try:
            return training.terms(batch, NAMES[split], 0)
        except KeyError as error:
            keys = ", ".join(map(str, batch)) if isinstance(batch, dict) else "none"
            raise InputError(
                f"data.params.{split} gives no {error}, which the model reads; it gives {keys}"
            ) from None
