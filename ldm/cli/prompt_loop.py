"""A loop that asks for prompts and draws them, with the model loaded once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from ldm.cli import flags
from ldm.config import TomeKeys
from ldm.errors import InputError
from ldm.settings import Settings

HELP = """\
A line is a prompt, which is drawn; Ctrl+C stops a picture. Commands:
  !set NAME VALUE   any flag of the picture: !set steps 30, !set tome.ratio 0.4, !set seed -1
  !unset NAME       back to its default
  !show             what is set
  !help             this text
  !quit             the end, as is Ctrl+D"""


def prompt_loop(
    parser: flags.Parser,
    args: flags.Arguments,
    set_tome: Callable[[TomeKeys], None],
    draw: Callable[[Settings], None],
) -> None:
    """Ask for prompts and draw them, until the user has enough.

    Args:
        parser: of the program's flags.
        args: what was given; the commands change a copy.
        set_tome: takes the Token Merging settings; raises InputError where they cannot be used.
        draw: draws and saves.
    """
    print(HELP)
    while True:
        try:
            line = input("prompt> ").strip()
        except EOFError:
            print()
            return
        if line == "!quit":
            return
        try:
            if line.startswith("!"):
                args = _command(line, parser, args, set_tome)
            elif line:
                draw(flags.settings(parser.changed(args, {"prompt": line})))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)


def _command(
    line: str,
    parser: flags.Parser,
    args: flags.Arguments,
    set_tome: Callable[[TomeKeys], None],
) -> flags.Arguments:
    """Do what a command says; returns the arguments that hold from now on."""
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"{line}: {error}") from None
    if command == "!help" and not words:
        print(HELP)
        return args
    if command == "!show" and not words:
        for name, given in parser.given(args).items():
            print(f"{name} {' '.join(map(str, given)) if isinstance(given, list) else given}")
        return args
    if command == "!set" and words:
        value: list[str] | None = words[1:] or ["true"]
    elif command == "!unset" and len(words) == 1:
        value = None
    else:
        raise InputError(
            f"{line}: the commands are !set NAME VALUE, !unset NAME, !show, !help, !quit"
        )
    changed = parser.changed(args, {words[0]: value})
    flags.settings(parser.changed(changed, {"seed": 0}))  # no seed is chosen just for a check
    set_tome(flags.tome_arguments(changed))
    return changed
