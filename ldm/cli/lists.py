"""Lists in a flag: words with commas between."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm.errors import InputError, shown

LARGEST = 100_000  # of a number; a plan of so many entries is soon made
MOST_WORDS = 100  # in a list


def words(text: str, flag: str, may_be_empty: bool = False) -> list[str]:
    """The parts of a comma-separated list, each once."""
    found = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not found and not may_be_empty:
        raise InputError(f"{flag}: the list is empty")
    if len(found) > MOST_WORDS:
        raise InputError(f"{flag}: {len(found)} entries, and {MOST_WORDS} is the limit for a list")
    return found


def numbers(text: str, flag: str, step: int = 1, least: int = 1, most: int = LARGEST) -> list[int]:
    """The whole numbers of a list, within bounds, and multiples of ``step``."""
    found = []
    for word in words(text, flag):
        number = int(word) if word.isdecimal() and len(word) < 20 else -1
        if not least <= number <= most or number % step:
            lowest = max(least, step) if step > 1 else least
            kind = f"multiples of {step}" if step > 1 else "whole numbers"
            raise InputError(f"{flag} {word}: allowed are {kind} from {lowest} to {most}")
        found.append(number)
    return found


def at_least(least: int, args: argparse.Namespace, *names: str, most: int = LARGEST) -> None:
    """Refuse flags beyond a bound; those that are None were not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise InputError(
                f"--{name} {shown(value)}: allowed is at least {least}, at most {most}"
            )


def choices(text: str, flag: str, allowed: Sequence[str], may_be_empty: bool = False) -> list[str]:
    """The words of a list, all of which have to be among those allowed."""
    found = words(text, flag, may_be_empty)
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
