"""The command line of training: upstream's flags, and every setting of the trainer as one."""

from __future__ import annotations

import argparse
import logging
import os
import re
from typing import Any, NoReturn

from ldm.cli.parser import check_paths
from ldm.errors import InputError, escaped, shown
from ldm.plain_yaml import parse_yaml
from ldm.training.trainer import GONE, OLD_KEYS, TRAINER

logger = logging.getLogger(__name__)
MAX_SEED = 2**32 - 1  # numpy's
DESCRIPTION = """Train a first stage, a diffusion model or a classifier, from YAML configurations.

The files of --base are merged from left to right, and key.path=value arguments over them.
"""
EPILOG = """
examples:
  your own first stage, then your own diffusion model:
    python scripts/train.py --base first_stage.yaml --train
    python scripts/train.py --base diffusion.yaml --train
  the first of the runs that scripts/make_demo.py makes the demo model by:
    python scripts/train.py --base configs/demo/classifier.yaml --train
  go on where a run stopped:
    python scripts/train.py --resume logs/2026-01-31T12-00-00_diffusion --train
  a checkpoint, trained further on your own pictures (docs/training.md has such a photos.yaml):
    python scripts/train.py --base model.yaml photos.yaml --finetune_from model.ckpt --train
  change a setting:
    python scripts/train.py --base diffusion.yaml --train data.params.batch_size=8
"""
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.ASCII | re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Complains in one line, and takes ``-`` and ``_`` in flags for one."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        raise InputError(f"{escaped(message, 400)} (--help lists the flags)")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the ``key.path=value`` items among them.

    Raises:
        InputError: a flag is unknown, or has a value that is not allowed.
    """
    parser = build_parser()
    flags = parser._option_string_actions
    known = {flag.replace("_", "-"): flag for flag in flags}
    words: list[str] = []
    overrides: list[str] = []
    takes_next = False
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"{shown(argument)} has a zero byte in it")
        # taken out first, or else a flag with an optional value (--train) would swallow one
        if _OVERRIDE.fullmatch(argument) and not takes_next:
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flag = known.get(flag.replace("_", "-"), flag)
        words.append(flag + equals + value)
        takes_next = not equals and flag in flags and flags[flag].nargs is None
    options = parser.parse_args(words)
    check_paths(parser, options)
    _check(options)
    return options, overrides


def build_parser() -> argparse.ArgumentParser:
    """Upstream's flags, and those of Lightning's trainer."""
    parser = Parser(
        usage="%(prog)s --base YAML [YAML ...] --train [options] [key.path=value ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    add("-r", "--resume", metavar="PATH", help="a run's folder, or a checkpoint in it")
    add("-n", "--name", default="", help="added to the name of the run's folder")
    add("-f", "--postfix", default="", help="added after the name")
    add(
        "-l",
        "--logdir",
        default="logs",
        metavar="DIR",
        help="where runs are kept (default: %(default)s)",
    )
    add("-s", "--seed", type=_seed, help="default: that of the run to resume, else 23")
    add("--no-test", default=False, **switch, help="do not run the test pictures at the end")
    scale_help = "multiply the learning rate by devices * batch size * accumulated batches"
    add("--scale_lr", default=True, **switch, help=scale_help)
    add(
        "--finetune_from",
        "--actual_resume",
        metavar="FILE",
        help="start with the weights of a checkpoint (model.params.ckpt_path)",
    )
    add(
        "--allow-module",
        action="append",
        default=[],
        metavar="NAME",
        help="let targets name classes of this Python module, too: its code will run",
    )
    for flag in ("-p", "--project"), ("-d", "--debug"):
        add(*flag, nargs="?", const="", help=argparse.SUPPRESS)
    group = parser.add_argument_group("trainer", "they win over lightning.trainer of the YAML")
    for name, key in TRAINER.items():
        group.add_argument(f"--{name}", metavar="VALUE", type=_value, help=key.allowed)
    for name in (*OLD_KEYS, *GONE):
        group.add_argument(f"--{name}", nargs="?", type=_value, help=argparse.SUPPRESS)
    return parser


def as_bool(text: str) -> bool:
    """Read upstream's spellings of true and false."""
    known = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True)}
    known |= dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither true nor false")
    return known[text.lower()]


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)}: allowed is 0 to {MAX_SEED}")
    return int(text)


def _value(text: str) -> Any:
    """A word as YAML reads it, except that a list of devices such as ``0,`` stays text."""
    if len(text) > 200:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too long")
    if re.fullmatch(r"[\d,]*,[\d,]*", text):
        return text
    try:
        return parse_yaml(text, "value")
    except InputError:
        return text


def _check(options: argparse.Namespace) -> None:
    for name in ("project", "debug"):
        if getattr(options, name) is not None:
            logger.info("--%s has no meaning here and is left out", name)
    if options.name and options.resume:
        raise InputError("--name and --resume exclude each other: a resumed run keeps its folder")
    if not options.base and not options.resume:
        raise InputError("nothing to train: give --base YAML, or --resume FOLDER")
    if options.finetune_from and options.resume:
        raise InputError("--finetune_from begins a run with others' weights: leave out --resume")
    if options.finetune_from and not os.path.exists(options.finetune_from):
        raise InputError(f"--finetune_from {shown(options.finetune_from)}: there is no such file")
    for flag in ("name", "postfix"):
        text = getattr(options, flag)
        if not re.fullmatch(r"[\w .,=+@-]*", text) or text.startswith(".") or len(text) > 100:
            raise InputError(
                f"--{flag} {shown(text)}: allowed are up to 100 letters, digits and any of "
                "'_ .,=+@-', as it becomes part of a folder's name"
            )
