"""What the command-line programs have in common: flags, checks, and how they end.

Importing this takes no torch, so ``--help`` and complaints about flags come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ldm.cli.tome_flags import parse_flag
from ldm.config import TomeKeys, find_config, load_preset
from ldm.errors import InputError
from ldm.images import Gallery
from ldm.modules.tome.config import KEYS, overlay, refuse_contradictions
from ldm.settings import NOISE_ORDERS, SAMPLERS, SCHEDULES, UPSCALERS, Settings

# keys whose flags take several words, and what these are called
LIST_KEYS = {"stride": ("ROWS", "COLUMNS"), "apply_to": ("PLACE", "PLACE")}
DTYPES = ("auto", "float32", "bfloat16", "float16")


Arguments: TypeAlias = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and to which ``-`` and ``_`` in flags are one.

    Args:
        description: what the program does.
        epilog: examples, shown as they are.
    """

    def __init__(self, description: str, epilog: str) -> None:
        super().__init__(
            usage="python scripts/%(prog)s [flags]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, by default the process's own."""
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled = []
        for argument in sys.argv[1:] if args is None else args:
            flag, equals, value = argument.partition("=")
            spelled.append(known.get(flag.replace("_", "-"), flag) + equals + value)
        return super().parse_known_args(spelled, namespace)

    def changed(self, args: Arguments, changes: Mapping[str, Any]) -> Arguments:
        """Arguments in which some settings of the picture are others.

        Args:
            args: parsed by this parser; left as they are.
            changes: values by the flags' names: {"steps": 20, "tome.ratio": 0.5} or {"tome":
                {"ratio": 0.5}}; a list is a flag's words, None stands for its default.

        Raises:
            InputError: a name is none of these, or a value is not allowed.
        """
        copy = argparse.Namespace(**vars(args))
        # what must be there is there already, but argparse wants to see it again
        needed = (action for action in self._actions if action.required)
        argv = [f"{action.option_strings[0]}={getattr(args, action.dest)}" for action in needed]
        for name, value in _flat(changes):
            action = self._picture_flags().get(name.replace("_", "-"))
            if action is None:
                raise InputError(f"{name!r} is no setting of a picture (--help lists the flags)")
            words = [_word(one) for one in (value if isinstance(value, list) else [value])]
            if value is None or (action.nargs == 0 and words == ["false"]):
                setattr(copy, action.dest, action.default)
            elif action.nargs == 0 and words != ["true"]:
                raise InputError(f"{name} {' '.join(words)}: allowed is true or false")
            elif action.nargs == 0:
                argv.append(action.option_strings[0])
            elif action.nargs == "+":
                argv += [action.option_strings[0], *words]
            else:
                argv.append(f"{action.option_strings[0]}={' '.join(words)}")
        return self.parse_args(argv, copy)

    def given(self, args: Arguments) -> dict[str, Any]:
        """The settings of the picture that are not the flags' defaults, by the flags' names."""
        found: dict[str, tuple[str, Any]] = {}
        for name, action in self._picture_flags().items():
            value = getattr(args, action.dest)
            if value != action.default:
                found.setdefault(action.dest, (name, value))
        return dict(found.values())

    def _picture_flags(self) -> dict[str, argparse.Action]:
        """The flags that decide about a picture, by their names with ``-``."""
        names = {field.name for field in dataclasses.fields(Settings)}
        return {
            flag.lstrip("-").replace("_", "-"): action
            for flag, action in self._option_string_actions.items()
            if action.dest in names or "tome" in action.dest
        }

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        raise InputError(f"{message} (--help lists the flags)")


def _flat(changes: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values with the mappings inside taken apart: {"a": {"b": 1}} -> ("a-b", 1)."""
    pairs: list[tuple[str, Any]] = []
    for key, value in changes.items():
        name = prefix + key.replace(".", "-")
        pairs += _flat(value, f"{name}-") if isinstance(value, Mapping) else [(name, value)]
    return pairs


def _word(value: Any) -> str:
    """A value as a flag has it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# --- flags ------------------------------------------------------------------------------------


def add_prompt_flags(parser: Parser, has_file: bool = True) -> argparse._ArgumentGroup:
    """What to draw; returns the group, for what a program adds to it."""
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", help="the text to draw (default: the model's own example)")
    group.add_argument(
        "--negative_prompt", default="", metavar="TEXT", help="what to steer away from"
    )
    group.add_argument(
        "--long_prompt",
        action="store_true",
        help="read prompts of any length, in chunks of 75 tokens (default: cut them off)",
    )
    group.add_argument(
        "--emphasis",
        action="store_true",
        help=r"read (word:1.2), (word) and [word] as weights; \( is a bracket",
    )
    if has_file:
        group.add_argument(
            "--from-file",
            metavar="FILE",
            help="draw a picture for each line of a text file: a prompt, or in txt2img and img2img "
            "a JSON object of flags by their names; empty lines and # comments are skipped",
        )
        group.add_argument(
            "--repeat", type=int, default=1, metavar="N", help="with --from-file: N for each line"
        )
    return group


def add_strength_flag(group: argparse._ArgumentGroup) -> None:
    """How much of a picture to start from is redrawn."""
    group.add_argument(
        "--strength",
        type=float,
        default=0.75,
        metavar="0..1",
        help="how much to redraw (default: 0.75); 1 ignores the picture",
    )


def add_sampling_flags(parser: Parser) -> None:
    """How to draw it."""
    group = parser.add_argument_group("how to draw it (defaults come from the model)")
    add = group.add_argument
    add("--ddim_steps", "--steps", type=int, dest="steps", metavar="N", help="sampling steps")
    add("--sampler", choices=SAMPLERS, help="how noise is removed")
    add("--plms", action="store_const", const="plms", dest="sampler", help="= --sampler plms")
    add(
        "--dpm_solver",
        "--dpm",
        action="store_const",
        const="dpm_solver",
        dest="sampler",
        help="= --sampler dpm_solver",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="uniform",
        help="steps of euler, euler_a and dpmpp_2m: uniform in time (default), or karras, with "
        "more of them at little noise",
    )
    add("--ddim_eta", type=float, default=0.0, dest="eta", metavar="0..1", help="noise of DDIM")
    add(
        "--scale",
        type=float,
        help="guidance: e(empty) + scale * (e(prompt) - e(empty)); 1 does without, twice as fast",
    )
    add("--H", type=int, help="height in pixels, a multiple of 8")
    add("--W", type=int, help="width in pixels, a multiple of 8")
    add("--seed", type=int, default=42, help="default: 42; -1 chooses one")
    add("--n_samples", type=int, default=1, metavar="N", help="pictures at a time (default: 1)")
    add("--n_iter", type=int, default=1, metavar="N", help="how often to do that (default: 1)")
    add(
        "--rng",
        choices=NOISE_ORDERS,
        default="image",
        help="image (default): picture i has its own noise, from seed + i; upstream: one stream "
        "of noise for all, as CompVis's scripts draw it",
    )
    add(
        "--fixed_code",
        action="store_true",
        help="start all pictures from the same noise (with --rng upstream: all batches)",
    )


def add_hires_flags(parser: Parser) -> None:
    """The second pass of txt2img, on the enlarged picture."""
    group = parser.add_argument_group(
        "second pass", "The picture is enlarged and redrawn, as with img2img."
    )
    add = group.add_argument
    add(
        "--hires_scale",
        type=float,
        default=1.0,
        metavar="1..8",
        help="factor by which it is enlarged; 1 (default): no second pass",
    )
    add(
        "--hires_strength",
        type=float,
        default=0.6,
        metavar="0..1",
        help="how much is redrawn (default: 0.6)",
    )
    add(
        "--hires_steps",
        type=int,
        metavar="N",
        help="sampling steps, of which the strength's share is taken (default: as --steps)",
    )
    add(
        "--hires_upscaler",
        choices=UPSCALERS,
        default="latent",
        help="latent (default): enlarge the latents; lanczos: the picture, which stays closer to "
        "the first pass",
    )
    add(
        "--tome-hires-ratio",
        metavar="RATIO|auto",
        help="share of tokens removed in the second pass; = --tome-hires ratio=RATIO",
    )


def add_model_flags(parser: Parser) -> None:
    """What draws it."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add(
        "--ckpt",
        metavar="PATH",
        help="checkpoint (.ckpt or .safetensors) of Stable Diffusion 1 or 2; default: "
        "models/ldm/stable-diffusion-v1/model.ckpt if it is there, else the demo model",
    )
    add("--config", metavar="YAML", help="its configuration; rarely needed, as it is recognised")
    add("--C", type=int, help="latent channels; only checked, the model decides")
    add("--f", type=int, help="pixels to a latent; only checked, the model decides")
    add("--ema", action="store_true", help="use the averaged weights of a training checkpoint")
    add(
        "--parameterization",
        choices=("eps", "v"),
        help="what the model predicts, if that cannot be recognised",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="add a LoRA to the weights, as much of it as the weight says (default: 1); again for "
        "several",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="a textual inversion: its file's name, in a prompt, stands for what it has learnt; "
        "again for several",
    )
    add(
        "--device",
        default="auto",
        help="auto (default): cuda, else mps, else cpu; or one of these, or cuda:1",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights; auto (default): float16 on cuda, bfloat16 on processors made "
        "for it, else float32",
    )
    add(
        "--precision",
        choices=("full", "autocast"),
        default="autocast",
        help="full: --dtype float32; autocast (default): whatever --dtype says",
    )
    add(
        "--attention",
        choices=("sdpa", "einsum"),
        default="sdpa",
        help="sdpa (default): torch's fused kernels; einsum: CompVis's formula, for comparison",
    )


def add_tome_flags(parser: Parser) -> None:
    """How tokens are merged: a flag for each key of the model's ``tome_config``."""
    group = parser.add_argument_group(
        "Token Merging", "A flag wins over the preset, the preset over the model's YAML."
    )
    for name, key in KEYS.items():
        options: dict[str, Any] = {"metavar": key.values}
        if key.values == "BOOL":
            options |= {"nargs": "?", "const": "true"}
        elif name in LIST_KEYS:
            options |= {"nargs": "+", "metavar": LIST_KEYS[name]}
        flag = "--tome-" + name.replace("_", "-")
        group.add_argument(flag, dest=f"tome_{name}", help=key.help, **options)
    group.add_argument(
        "--tome-preset", metavar="NAME", help="a file of configs/tome, or one of your own (.yaml)"
    )
    group.add_argument(
        "--no-tome", action="store_true", help="merge nothing, whatever the YAML says"
    )


def add_output_flags(parser: Parser, outdir: str) -> None:
    """Where it goes."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--outdir", default=outdir, metavar="DIR", help="where pictures go (default: %(default)s)")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid")
    add("--skip_grid", action="store_true", help="do not save a grid")
    add("--skip_save", action="store_true", help="save no single pictures")
    add("--no_metadata", action="store_true", help="do not write the settings into the pictures")


# --- what the flags mean ----------------------------------------------------------------------


def settings(args: argparse.Namespace) -> Settings:
    """The checked settings among a program's arguments.

    Args:
        args: parsed arguments.

    Raises:
        InputError: a value is out of range, or there is nothing in the file of prompts.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if getattr(args, "from_file", None) is not None:
        values["prompt"] = read_prompts(args.from_file, args.repeat)
    elif getattr(args, "repeat", 1) != 1:
        raise InputError("--repeat goes with --from-file; --n_iter repeats a single prompt")
    return Settings(**values)


def read_prompts(path: str | Path, repeat: int = 1) -> tuple[str, ...]:
    """The lines of a file, without empty ones and comments (#), each so many times.

    Raises:
        InputError: the file cannot be read as text, or has no such line.
    """
    lines = read_lines(path, repeat)
    for number, line in lines:
        if line.startswith("{"):
            raise InputError(f"{path}, line {number}: here a line is a prompt, not JSON")
    return tuple(line for _, line in lines)


def read_lines(path: str | Path, repeat: int = 1) -> list[tuple[int, str]]:
    """Number and text of a file's lines, without empty ones and comments, each so many times.

    Raises:
        InputError: the file cannot be read as text, or has no such line.
    """
    if repeat < 1:
        raise InputError(f"repeat {repeat}: allowed is at least 1")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    kept = [(i, line) for i, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not kept:
        raise InputError(f"{path}: there is no prompt in it; write one a line")
    return [numbered for numbered in kept for _ in range(repeat)]


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The checked arguments of ``Pipeline.from_checkpoint``.

    Raises:
        InputError: a file is missing, or flags contradict each other.
    """
    if args.ckpt is not None and not Path(args.ckpt).exists():
        raise InputError(
            f"--ckpt {args.ckpt}: there is no such file (leave the flag out to use the demo model)"
        )
    if args.config is not None:
        find_config(args.config)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", args.device):
        raise InputError(f"--device {args.device}: allowed is auto, cpu, mps, cuda or cuda:NUMBER")
    dtype = args.dtype
    if args.precision == "full":
        if dtype not in ("auto", "float32"):
            raise InputError(f"--precision full means float32: leave out --dtype {dtype}")
        dtype = "float32"
    return {
        "path": args.ckpt,
        "config": args.config,
        "device": args.device,
        "dtype": dtype,
        "tome": tome_arguments(args) if hasattr(args, "no_tome") else None,
        "attention": args.attention,
        "ema": args.ema,
        "parameterization": args.parameterization,
        "loras": [lora_argument(text) for text in args.lora],
        "embeddings": [_existing("--embedding", text) for text in args.embedding],
    }


def lora_argument(text: str) -> tuple[Path, float]:
    """Read the text of a flag ``--lora``: a file, and what follows the last colon, else 1.

    Raises:
        InputError: there is no such file, or the weight is not a number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or not Path(name).exists():
        return _existing("--lora", text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        raise InputError(f"--lora {text}: the weight {weight!r} is not a number") from None


def _existing(flag: str, path: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: there is no such file")
    return Path(path)


def tome_arguments(args: argparse.Namespace) -> TomeKeys:
    """Token Merging settings: flags over the preset; None without either, False for ``--no-tome``.

    Raises:
        InputError: there is no such preset, a value is not one of those allowed, or ``--no-tome``
            is not alone.
    """
    given = {name: getattr(args, f"tome_{name}") for name in KEYS}
    texts = {
        name: " ".join(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    hires_ratio = getattr(args, "tome_hires_ratio", None)
    if args.no_tome:
        if texts or hires_ratio is not None or args.tome_preset is not None:
            raise InputError("--no-tome merges nothing: leave out the other --tome flags")
        return False
    flags = {name: _tome_value(name, text, name) for name, text in texts.items()}
    if hires_ratio is not None:
        ratio = {"ratio": _tome_value("ratio", hires_ratio, "hires_ratio")}
        flags["hires"] = overlay(flags.get("hires"), ratio)
    preset = None if args.tome_preset is None else load_preset(args.tome_preset, may_be_path=True)
    keys = overlay(preset, flags)
    refuse_contradictions(keys)
    return keys or None


def _tome_value(key: str, text: str, flag: str) -> Any:
    """The checked value of a Token Merging flag."""
    value = parse_flag(key, text)
    try:
        KEYS[key].check(value)
    except ValueError as limit:
        raise InputError(f"--tome-{flag.replace('_', '-')} {text}: {limit}") from None
    return value


def gallery(args: argparse.Namespace) -> Gallery:
    """The folder of results.

    Raises:
        InputError: pictures cannot be written there.
    """
    if args.n_rows < 0:
        raise InputError(f"--n_rows {args.n_rows}: allowed is 0 (--n_samples) or more")
    check_writable(args.outdir)
    return Gallery(
        folder=Path(args.outdir),
        n_columns=args.n_rows or args.n_samples,
        has_samples=not args.skip_save,
        has_grid=not args.skip_grid,
        has_settings=not args.no_metadata,
    )


def check_writable(outdir: str) -> None:
    """Check that files can be written in a folder, or that it can be made; leave no trace."""
    folder = Path(outdir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--outdir {outdir}: cannot write there ({error.strerror})") from None


# --- lists in a flag --------------------------------------------------------------------------


def words(text: str, flag: str, may_be_empty: bool = False) -> list[str]:
    """The parts of a comma-separated list, each once."""
    found = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not found and not may_be_empty:
        raise InputError(f"{flag}: the list is empty")
    return found


def numbers(text: str, flag: str, step: int = 1) -> list[int]:
    """The whole numbers of a list; above 0, and multiples of ``step``."""
    found = []
    for word in words(text, flag):
        try:
            number = int(word)
        except ValueError:
            number = 0
        if number < 1 or number % step:
            kind = f"multiples of {step}" if step > 1 else "whole numbers above 0"
            raise InputError(f"{flag} {word}: allowed are {kind}")
        found.append(number)
    return found


def at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Refuse flags below a bound; those that are None were not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: allowed is at least {least}")


def choices(text: str, flag: str, allowed: Sequence[str]) -> list[str]:
    """The words of a list, all of which have to be among those allowed."""
    found = words(text, flag)
    for word in found:
        if word not in allowed:
            raise InputError(f"{flag} {word}: allowed is {', '.join(allowed)}")
    return found


def share(text: str, flag: str) -> float:
    """A number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise InputError(f"{flag} {text}: allowed are numbers above 0 and below 1")
    return value


# --- running ----------------------------------------------------------------------------------


class Messages(logging.Handler):
    """Shows what the package logs: news on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if record.levelno >= logging.WARNING:
            print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)
        else:
            print(record.getMessage(), flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a program: show what it logs, and end with one clear line where the input is bad.

    The exit code is 2 for bad input, 3 for too little memory and 130 where the user interrupts.
    """
    logger = logging.getLogger("ldm")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, Messages) for handler in logger.handlers):
        logger.addHandler(Messages())
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
