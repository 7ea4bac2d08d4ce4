"""Training runs of a few steps."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import yaml
from PIL import Image
from torch.utils.data import IterableDataset

from ldm.training.run import main
from tests.tiny_models import FIRST_STAGE, tiny_config

LOSS = {"target": "ldm.models.autoencoder.ReconstructionLoss"}


def pictures(folder: Path, n: int = 7) -> Path:
    """A folder of small pictures with captions."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        pixels = np.full((16, 16, 3), 20 * i, np.uint8)
        pixels[4 : 4 + i, 3:9] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def toy_config(data: Path, **trainer: Any) -> dict[str, Any]:
    """A first stage that is trained on a folder of pictures, flipped at random."""
    model = copy.deepcopy(FIRST_STAGE)
    model["params"]["ddconfig"] |= {"ch": 8, "norm_groups": 4}
    model["params"]["lossconfig"] = LOSS
    split = {"target": "ldm.data.folder.FolderPictures"}
    split["params"] = {"folder": str(data), "size": 16, "flip": True}
    return {
        "model": {"base_learning_rate": 1e-3, **model},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 2, "num_workers": 0, "train": split, "validation": split},
        },
        "lightning": {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                **trainer,
            },
            "modelcheckpoint": {"params": {"every_n_train_steps": 1, "save_top_k": -1}},
        },
    }


def write(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration."""
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, logs: Path, *arguments: str) -> Path:
    """Train; returns the run's folder."""
    before = set(logs.glob("*"))
    own = ["--allow-module", "tests.training.toy"]
    main(["--base", str(config), "--train", "--logdir", str(logs), *own, *arguments])
    (run,) = set(logs.glob("*")) - before
    return run


def diffusion_config(data: Path, **trainer: Any) -> dict[str, Any]:
    """A diffusion model with an average of its weights and merging, on the same pictures."""
    config = toy_config(data, **trainer)
    params = tiny_config(use_ema=True)["model"]["params"]
    params |= {"first_stage_key": "image", "cond_stage_key": "caption"}
    params["ucg_training"] = {"caption": {"p": 0.3}}
    params["unet_config"]["params"]["tome_config"] = {"method": "random", "ratio": 0.5}
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    config["model"] = {"base_learning_rate": 1e-3, "target": target, "params": params}
    return config


class Stream(IterableDataset):
    """Pictures without an end, which cannot be asked for by number."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            yield {"image": np.full((16, 16, 3), i % 7 / 7, np.float32)}


class Interrupting(pl.Callback):
    """Sends its own process signals.

    Args:
        name: of the signal, or of several, one after another.
        step: after which it comes.
        when: ``setup``, ``batch`` (within that step) or ``validation``.
    """

    def __init__(self, name: str, step: int, when: str) -> None:
        self.name = name
        self.step = step
        self.when = when
        self.is_sent = False

    def _send(self, when: str, step: int) -> None:
        if when == self.when and step == self.step and not self.is_sent:
            self.is_sent = True
            for name in self.name.split():
                os.kill(os.getpid(), getattr(signal, name))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._send("setup", 0)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._send("batch", trainer.global_step + 1)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self._send("validation", trainer.global_step)
