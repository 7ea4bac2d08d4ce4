"""What flags mean: checked arguments of the pipeline and the gallery, before torch is imported."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.addons import lora_files, taken_loras
from ldm.cli.parser import Arguments, Parser
from ldm.cli.values import Wishes
from ldm.config import find_config
from ldm.errors import InputError, escaped, shown
from ldm.images import Gallery, load_rgb, picture_texts
from ldm.infotext import fitting, understood
from ldm.modules.tome.config import ToMeConfig, ToMeWish
from ldm.settings import Settings
from ldm.text import MAX_BYTES, check_text, decode_text, read_text, split_lines

LONGEST_LINE = 100_000  # characters
MOST_PICTURES = 1_000_000  # in a run

logger = logging.getLogger(__name__)


def parse(parser: Parser, argv: Sequence[str] | None = None) -> Arguments:
    """The arguments of a program; the settings of --from_picture are defaults below its flags.

    Raises:
        InputError: a flag is wrong, or the picture says nothing that can be used.
    """
    args = parser.parse_args(argv)
    if getattr(args, "from_picture", None) is None:
        return args
    found = understood(picture_texts(args.from_picture), args.from_picture)
    found = found.without_missing_loras()
    if args.sampler is not None:  # which may not have what the picture's has
        found.settings["sampler"] = args.sampler
        found = fitting(found)
    fields = {field.name for field in dataclasses.fields(Settings)} & vars(args).keys()
    usable, left_out = {}, list(found.left_out)
    prompt = found.settings.get("prompt")
    if args.lora and isinstance(prompt, str) and taken_loras(prompt)[1]:
        found.settings["prompt"] = taken_loras(prompt)[0]
        left_out.append("the LoRAs that its prompt names: --lora takes their place")
    has_others = getattr(args, "interactive", False) or getattr(args, "from_file", None) is not None
    if has_others and found.settings.pop("prompt", None) is not None:
        left_out.append("its prompt: others are drawn")
    for name, value in found.settings.items():
        try:
            Wishes(frozenset(fields)).changed({name: value}).check()
            usable[name] = value
        except InputError as error:
            left_out.append(str(error) if name in fields else f"{name} {shown(value)}")
    tome = found.tome
    if tome:
        try:
            ToMeConfig.from_mapping(tome)
        except InputError as error:
            tome = None
            left_out.append(str(error))
    parser.set_defaults(**usable)
    args = parser.parse_args(argv)
    has_flags = Wishes.of_flags(vars(args)).tome != ToMeWish()
    args.tome_below = tome or {}
    args.no_tome = args.no_tome or (tome is False and not has_flags)
    named = [*usable, *(["Token Merging"] if tome else [])]
    logger.info("From %s: %s", args.from_picture, ", ".join(named) or "nothing")
    for what in left_out:
        logger.info("Not from %s: %s", args.from_picture, what)
    return args


def wishes(args: Arguments) -> Wishes:
    """What the flags ask for: settings of the picture, and of token merging.

    Raises:
        InputError: there is no such preset, or a value is not allowed.
    """
    return Wishes.of_flags(vars(args))


def settings(args: Arguments) -> Settings:
    """The checked settings among a program's arguments.

    Raises:
        InputError: a value is out of range, a LoRA is not there, or there is nothing in the file
            of prompts.
    """
    prompts = None
    if getattr(args, "from_file", None) is not None:
        prompts = read_prompts(args.from_file, args.repeat)
        say_unused_prompt(args)
    else:
        refuse_repeat(args)
    found = wishes(args).settings(prompts)
    for tags in {taken_loras(prompt)[1] for prompt in found.prompts}:
        lora_files(tags)  # which have to be there
    return found


def say_unused_prompt(args: Arguments) -> None:
    """Say that --prompt is not drawn where all lines of --from-file have prompts of their own."""
    if args.prompt is not None:
        logger.warning("--prompt is not drawn: the lines of --from-file have prompts of their own")


def refuse_repeat(args: Arguments) -> None:
    """Refuse --repeat without a file."""
    if getattr(args, "repeat", 1) != 1:
        raise InputError("--repeat goes with --from-file; --n_iter repeats a single prompt")


def read_prompts(path: str | Path, repeat: int = 1) -> tuple[str, ...]:
    """The lines of a file, without empty ones and comments (#), each so many times.

    Raises:
        InputError: the file cannot be read as text, or has no such line.
    """
    lines = read_lines(path, repeat)
    for number, line in lines:
        if line.startswith("{"):
            raise InputError(f"{path}, line {number}: here a line is a prompt, not JSON")
    return tuple(line for _, line in lines for _ in range(repeat))


def read_lines(path: str | Path, repeat: int = 1) -> list[tuple[int, str]]:
    """Number and text of a file's lines, without empty ones and comments; ``-``: standard input.

    Args:
        path: of the file.
        repeat: how often each line is drawn.

    Raises:
        InputError: the file cannot be read as text, or has no such line, or too many.
    """
    is_piped = str(path) == "-"
    where = "standard input" if is_piped else str(path)
    kept = []
    for number, line in enumerate(split_lines(_piped() if is_piped else read_text(path)), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if re.match(r"--(no-?)?[a-z]", line):
            raise InputError(
                f"{where}, line {number}: this is a line of flags, as the A1111 web UI has them; "
                'write JSON: {"prompt": "...", "steps": 20}'
            )
        kept.append((number, check_text(line, f"{where}, line {number}", LONGEST_LINE)))
    if not kept:
        raise InputError(f"{where}: there is no prompt in it; write one a line")
    if len(kept) * repeat > MOST_PICTURES:
        raise InputError(
            f"--repeat {repeat}: {len(kept)} lines make more than {MOST_PICTURES} pictures, "
            "which is the limit for a run"
        )
    return kept


def _piped() -> str:
    """The text on standard input."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("--from-file -: pipe a file of prompts into the program")
    return decode_text(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")


def model_arguments(args: Arguments) -> dict[str, Any]:
    """The checked arguments of ``Pipeline.from_checkpoint``.

    Raises:
        InputError: a file is missing, or flags contradict each other.
    """
    if args.ckpt is not None and not exists(args.ckpt):
        raise InputError(
            f"--ckpt {args.ckpt}: there is no such file (leave the flag out to use the demo model)"
        )
    if args.config is not None:
        find_config(args.config)
    check_device(args.device)
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
        "tome": wishes(args).tome if hasattr(args, "no_tome") else ToMeWish(),
        "attention": args.attention,
        "compile": args.compile,
        "ema": args.ema,
        "parameterization": args.parameterization,
        "loras": [lora_argument(text) for text in args.lora],
        "embeddings": [embedding_argument(text) for text in args.embedding],
        "vae": None if args.vae is None else _existing("--vae", args.vae),
        "control": control_arguments(args),
    }


def control_arguments(args: Arguments) -> dict[str, Any] | None:
    """The checked arguments of ``Pipeline.set_control``; None without ``--controlnet``.

    Raises:
        InputError: a file is missing, a value is out of range, or flags need each other.
    """
    if args.controlnet is None or args.control is None:
        if args.controlnet is not None or args.control is not None:
            raise InputError("--controlnet FILE and --control PICTURE need each other")
        if args.control_canny or args.control_strength != 1:
            raise InputError("--control_canny and --control_strength need --controlnet FILE")
        return None
    if not 0 <= args.control_strength <= 2:
        raise InputError(f"--control_strength {args.control_strength}: allowed is 0 to 2")
    return {
        "net": _existing("--controlnet", args.controlnet),
        "picture": load_rgb(args.control),
        "strength": args.control_strength,
        "finds_edges": args.control_canny,
    }


def check_device(name: str) -> None:
    """Refuse what is no name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name, re.ASCII):
        raise InputError(f"--device {name}: allowed is auto, cpu, mps, cuda or cuda:NUMBER")


def lora_argument(text: str) -> tuple[Path, float]:
    """Read the text of a flag ``--lora``: a file, and what follows the last colon, else 1.

    Raises:
        InputError: there is no such file, or the weight is not a number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or exists(text) or not exists(name):
        return _existing("--lora", text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not -100 <= value <= 100:
        raise InputError(f"--lora {text}: the weight {weight!r} is not a number from -100 to 100")
    return _existing("--lora", name), value


def embedding_argument(text: str) -> Path | tuple[Path, str]:
    """Read the text of a flag ``--embedding``: a file, and a word after the last colon.

    Raises:
        InputError: there is no such file, or the word is none.
    """
    name, colon, word = text.rpartition(":")
    if not colon or exists(text) or not exists(name):
        return _existing("--embedding", text)
    if not (word.strip() and word.isprintable() and len(word) <= 100):
        raise InputError(f"--embedding {escaped(text)}: give a word of 1 to 100 characters")
    return _existing("--embedding", name), word


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder; what can be no path is not there."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _existing(flag: str, path: str) -> Path:
    if not exists(path) or not Path(path).is_file():
        raise InputError(f"{flag} {path}: there is no such file")
    return Path(path)


def gallery(args: Arguments) -> Gallery:
    """The folder of results.

    Raises:
        InputError: pictures cannot be written there.
    """
    check_writable(args.outdir)
    if not args.skip_save:
        check_writable(str(Path(args.outdir) / "samples"))
    return Gallery(
        folder=Path(args.outdir),
        n_columns=args.n_rows or min(args.n_samples, 10_000),
        has_samples=not args.skip_save,
        has_grid=not args.skip_grid,
        has_settings=not args.no_metadata,
    )


def check_writable(outdir: str, flag: str = "--outdir") -> None:
    """Check that files can be written in a folder, or that it can be made; leave no trace."""
    try:
        Path(outdir).exists()  # complains of what can be no path
        folder = Path(outdir).absolute()
        while not folder.exists():
            if folder.is_symlink():
                raise ValueError(f"{escaped(folder)} is a link to nothing")
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} {escaped(outdir)}: cannot write there ({reason})") from None
