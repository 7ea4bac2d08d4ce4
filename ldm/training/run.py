"""Train a model: first stage, diffusion model or classifier, from YAML configurations.

The interface is that of upstream's main.py: ``--base`` files are merged from left to right, and
``key.path=value`` arguments are merged over them.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import InputError

EPILOG = """
examples:
  the demo's first stage, then its diffusion model:
    python scripts/train.py --base configs/demo/first_stage.yaml --train
    python scripts/train.py --base configs/demo/diffusion.yaml --train
  go on where a run stopped:
    python scripts/train.py --resume logs/2026-01-31T12-00-00_diffusion --train
  change a setting:
    python scripts/train.py --base configs/demo/diffusion.yaml --train data.params.batch_size=8
"""


def as_bool(text: str) -> bool:
    """Read upstream's spellings of true and false."""
    known = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True)}
    known |= dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    """Upstream's flags, and those of Lightning's trainer that people set by hand."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --base YAML [YAML ...] --train [options] [key.path=value ...]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    switch: dict[str, Any] = {"type": as_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    add(
        "-b",
        "--base",
        nargs="*",
        default=[],
        metavar="YAML",
        help="configurations, merged in order",
    )
    add("-t", "--train", default=False, **switch, help="train (else the configuration is shown)")
    add("-r", "--resume", default="", metavar="PATH", help="a run's folder, or a checkpoint in it")
    add("-n", "--name", default="", help="added to the name of the run's folder")
    add("-f", "--postfix", default="", help="added after the name")
    add("-l", "--logdir", default="logs", help="where runs are kept (default: %(default)s)")
    add("-s", "--seed", type=int, default=23, help="default: %(default)s")
    add("--no-test", default=False, **switch, help="do not run the test pictures at the end")
    scale_help = "multiply the learning rate by devices * batch size * accumulated batches"
    add("--scale_lr", default=True, **switch, help=scale_help)
    add("--max_steps", type=int, help="stop after this many steps")
    add("--max_epochs", type=int, help="stop after this many passes over the data")
    add("--devices", help="how many devices, or which (Lightning's spelling)")
    add("--accelerator", help="cpu, gpu, mps or auto")
    add("--precision", help="32-true, bf16-mixed, 16-mixed, ...")
    return parser


def resolve_resume(resume: str) -> tuple[Path, Path]:
    """The folder and the checkpoint of the run to go on with."""
    path = Path(resume)
    if path.is_file():
        return path.parent.parent, path
    checkpoint = path / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise InputError(f"--resume {resume}: there is no {checkpoint}; name a run's folder")
    return path, checkpoint


def learning_rate(config: dict, trainer: Any, scale: bool) -> float:
    """The base rate, multiplied as upstream does if ``scale``."""
    base = config["model"].get("base_learning_rate", 1e-4)
    if not scale:
        return base
    batch_size = config["data"]["params"]["batch_size"]
    return trainer.accumulate_grad_batches * trainer.world_size * batch_size * base


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train."""
    arguments = sys.argv[1:] if argv is None else argv
    # taken out first, or else a flag with an optional value (--train) would swallow one
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    options = build_parser().parse_args([text for text in arguments if text not in overrides])
    if options.name and options.resume:
        raise InputError("--name and --resume exclude each other: a resumed run keeps its folder")
    if not options.base and not options.resume:
        raise InputError("nothing to train: give --base YAML, or --resume FOLDER")
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    checkpoint = None
    files = list(options.base)
    if options.resume:
        logdir, checkpoint = resolve_resume(options.resume)
        stored = sorted((logdir / "configs").glob("*.yaml"))
        # every start stores its settings; the newest of each kind hold
        newest = {path.name.rsplit("-", 1)[1]: str(path) for path in stored}
        files = [*newest.values(), *files]
    else:
        name = options.name or Path(options.base[0]).stem
        logdir = Path(options.logdir) / f"{now}_{name}{options.postfix}"

    from ldm.config import load_config

    config = load_config(files, overrides)
    for section in ("model", "data"):
        if section not in config:
            raise InputError(f"the configuration has no section {section!r} ({', '.join(files)})")
    if not options.train:
        print(yaml.safe_dump(config, sort_keys=False))
        print("This is the configuration; add --train to train.")
        return
    fit(config, options, logdir, now, checkpoint)


def fit(
    config: dict, options: argparse.Namespace, logdir: Path, now: str, checkpoint: Path | None
) -> None:
    """Build model, data and trainer, and run them."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger
    from torch import nn

    from ldm.training.callbacks import CUDACallback, SetupCallback
    from ldm.training.wrap import in_training
    from ldm.util import instantiate_from_config

    pl.seed_everything(options.seed, workers=True)
    lightning = config.pop("lightning", {})
    model = instantiate_from_config(config["model"], nn.Module)
    data = instantiate_from_config(config["data"], pl.LightningDataModule)

    keep: dict[str, Any] = {"filename": "{epoch:06}-{step:09}", "save_last": True}
    if getattr(model, "monitor", None):
        keep |= {"monitor": model.monitor, "save_top_k": 1}
    keep |= lightning.get("modelcheckpoint", {}).get("params", {})
    callbacks = [
        SetupCallback(logdir, now, config, {"lightning": lightning}),
        ModelCheckpoint(dirpath=logdir / "checkpoints", **keep),
        LearningRateMonitor(logging_interval="step"),
        CUDACallback(),
        *(instantiate_from_config(c, pl.Callback) for c in lightning.get("callbacks", {}).values()),
    ]
    settings = dict(lightning.get("trainer", {}))
    for flag in ("max_steps", "max_epochs", "devices", "accelerator", "precision"):
        if getattr(options, flag) is not None:
            settings[flag] = getattr(options, flag)
    trainer = pl.Trainer(
        default_root_dir=logdir,
        logger=CSVLogger(logdir, name="metrics"),
        callbacks=callbacks,
        **settings,
    )
    rate = learning_rate(config, trainer, options.scale_lr)
    training = in_training(model, rate)
    print(f"Learning rate: {rate:.2e}. Run: {logdir}")
    if hasattr(signal, "SIGUSR1"):  # a cluster's warning before it stops a job; Unix only
        last = logdir / "checkpoints" / "last.ckpt"
        signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint(last))
    trainer.fit(training, data, ckpt_path=None if checkpoint is None else str(checkpoint))
    if data.configs["test"] is not None and not options.no_test and not trainer.interrupted:
        trainer.test(training, data)
