"""A loop that asks for prompts and draws them, with the model loaded once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

from ldm.cli.program import LONGEST, Terminated
from ldm.cli.values import Wishes, typed
from ldm.errors import InputError, escaped, memory_advice, shown
from ldm.modules.tome.config import ToMeWish
from ldm.settings import Settings

HELP = """\
A line is a prompt, which is drawn; Ctrl+C stops a picture. Commands:
  !set NAME VALUE   any flag of the picture: !set steps 30, !set tome.ratio 0.4, !set seed -1
  !unset NAME       back to its default
  !show             what is set
  !help             this text
  !quit             the end, as is Ctrl+D"""


def prompt_loop(
    wishes: Wishes, set_tome: Callable[[ToMeWish], None], draw: Callable[[Settings], None]
) -> None:
    """Ask for prompts and draw them, until the user has enough.

    Args:
        wishes: what was given; the commands change it.
        set_tome: takes the Token Merging settings; raises InputError where they cannot be used.
        draw: draws and saves.
    """
    print(HELP)
    while True:
        try:
            line = input("prompt> ").lstrip("\ufeff").strip()  # a piped file's mark (BOM)
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("error: this line is no text in UTF-8", file=sys.stderr, flush=True)
            continue
        if line == "!quit":
            return
        try:
            if line.startswith("!"):
                wishes = _command(line, wishes, set_tome)
            elif line:
                with memory_advice():
                    draw(wishes.changed({"prompt": line}).settings())
        except InputError as error:
            print(f"error: {escaped(error, LONGEST)}", file=sys.stderr, flush=True)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)


def _command(line: str, wishes: Wishes, set_tome: Callable[[ToMeWish], None]) -> Wishes:
    """Do what a command says; returns the wishes that hold from now on."""
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"{line}: {error}") from None
    if command == "!help" and not words:
        print(HELP)
        return wishes
    if command == "!show" and not words:
        for name, given in wishes.shown():
            print(f"{name} {_text(given)}")
        return wishes
    if command == "!set" and words:
        value: Any = typed(words[0], words[1:])
    elif command == "!unset" and len(words) == 1:
        value = None
    else:
        raise InputError(
            f"{shown(line)}: the commands are !set NAME VALUE, !unset NAME, !show, !help, !quit"
        )
    changed = wishes.changed({words[0]: value})
    changed.check()
    set_tome(changed.tome)
    return changed


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
