"""The parser of a program's own command line: one-line complaints, and old flags explained.

Nothing but the shell's words ever comes here; values of files, pages and typed lines go to
`ldm.cli.values`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ldm import __version__
from ldm.errors import InputError

Arguments: TypeAlias = argparse.Namespace

# How the values are called of flags that are files or folders.
PATHS = ("FILE", "DIR", "PATH", "PICTURE", "YAML", "CHECKPOINT")
_NOTHING = "there is no need for it here"
# Flags of upstream's and others' programs, and what takes their place.
OLD_FLAGS = {
    "--laion400m": "that model is not supported; give your own with --ckpt",
    "--turbo": _NOTHING,
    "--unet-bs": _NOTHING,
    "--small-batch": _NOTHING,
    "--medvram": "to save memory, use --n_samples 1 and --tome-ratio 0.5",
    "--lowvram": "to save memory, use --n_samples 1 and --tome-ratio 0.5",
    "--xformers": f"{_NOTHING}; --attention sdpa is the default",
    "--opt-split-attention": f"{_NOTHING}; --attention sdpa is the default",
    "--torchscript": _NOTHING,
    "--ipex": _NOTHING,
    "--bf16": "use --dtype bfloat16",
    "--full-precision": "use --precision full",
    "--no-half": "use --dtype float32",
    "--no-half-vae": "use --dtype float32",
    "--half": "use --dtype float16",
    "--format": "pictures are always PNG files",
    "--embedding-path": "use --embedding FILE",
    "--embeddings-dir": "use --embedding FILE",
    "--klms": "use --sampler, which lists its choices in --help",
    "--sampler-name": "use --sampler",
    "--scheduler": "use --schedule",
    "--ddim": "use --sampler ddim",
    "--cfg-scale": "use --scale",
    "--guidance-scale": "use --scale",
    "--width": "use --W",
    "--height": "use --H",
    "--batch-size": "use --n_samples",
    "--iterations": "use --n_iter",
    "--num-inference-steps": "use --steps",
    "--denoising-strength": "use --strength",
    "--init-image": "use --init-img",
    "--image": "use --init-img",
    "--output": "use --outdir",
    "--model": "use --ckpt",
    "--watermark": "there is no watermark",
    "--skip-safety": "there is no safety checker",
    "--token-merging-ratio": "use --tome-ratio",
    "--listen": "use --host 0.0.0.0",
    "--share": "nothing takes its place: the page is never published elsewhere",
    "--gradio-auth": "use --auth USER:PASSWORD",
    "--vae-path": "use --vae FILE",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and to which ``-`` and ``_`` in flags are one.

    Args:
        description: what the program does.
        epilog: examples, shown as they are.
    """

    def __init__(self, description: str | None, epilog: str) -> None:
        name = Path(sys.argv[0]).name
        typed = f"python scripts/{name}" if name.endswith(".py") else "%(prog)s"
        super().__init__(
            usage=f"{typed} [flags]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, by default the process's own."""
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled = []
        for argument in sys.argv[1:] if args is None else args:
            flag, equals, value = argument.partition("=")
            name = flag.replace("_", "-")
            if name in OLD_FLAGS and name not in known:
                raise InputError(f"{flag} is unknown: {OLD_FLAGS[name]} (--help lists the flags)")
            if equals and value == "--" and name in known:  # which argparse drops
                raise InputError(f"{argument}: '--' is not a value")
            spelled.append(known.get(name, flag) + equals + value)
        found, others = super().parse_known_args(spelled, namespace)
        check_paths(self, found)
        return found, others

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        message = re.sub(r"^argument (--[\w-]+): (?=\S+: allowed )", r"\1 ", message)
        raise InputError(f"{message} (--help lists the flags)")


def check_paths(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    """Check that no file or folder is an empty text, as an unset variable gives it.

    Raises:
        InputError: one is.
    """
    for action in parser._actions:
        given = getattr(found, action.dest, None)
        is_path = str(action.metavar).startswith(PATHS) and given != action.default
        if is_path and "" in (given if isinstance(given, list) else [given]):
            names = (flag for flag in action.option_strings if flag.startswith("--"))
            name = next(names, action.dest)
            raise InputError(f"{name}: an empty text is no file or folder")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number within bounds."""
    return _bounded(int, least, most)


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of a flag that is a number within bounds."""
    return _bounded(float, least, most)


def _bounded(kind: type, least: float, most: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: allowed is {least:.15g} to {most:.15g}")
        return value

    return read


def given(parser: argparse.ArgumentParser, args: Arguments) -> dict[str, Any]:
    """The flags whose values are not their defaults, by their destinations."""
    actions = {action.dest: action for action in parser._actions}
    return {
        name: value
        for name, value in vars(args).items()
        if name in actions and value != actions[name].default
    }
