"""What the fuzzers share: how many cases, hostile values, and what may come of a case.

A few hundred cases take seconds and run with the suite. For hours, set how many there are:

    FUZZ=100000 python -m pytest tests/fuzz -s

A failing case is told with its seed; ``FUZZ_SEED`` begins elsewhere.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ldm.errors import InputError, escaped

SEED = int(os.environ.get("FUZZ_SEED", "0"))

TEXTS = [
    *("", " ", "-", "--", "--help", "--ckpt=/etc/passwd", "@file", "/", "/etc/passwd", "..", "~"),
    *("a b", "x" * 3000, "ü日本", "\u2028", "\ufeff", "\x1b[2J", "a\nb", "\ud800", "%s", "$(id)"),
    *("nan", "inf", "-inf", "1e999", "0x10", "1_000", "\u0663", "None", "null", "true", "[" * 99),
    *("!!python/object/apply:os.system [id]", "&a [*a]", "${oc.env:HOME}", "{x}", "[]", "{}"),
    *(
        "0",
        "1",
        "-1",
        "2",
        "7",
        "8",
        "64",
        "0.5",
        "-0.5",
        "1.5",
        "1000",
        "1001",
        "9" * 11,
        "9" * 500,
    ),
    *("kv", "grid", "kth", "auto", "tokens//4", "tokens//0", "0:0.6,0.7:0", "9216:k=8;4096:k=4"),
    *("euler", "karras", "upstream", "eps", "v", "cpu", "cuda:99", "float16", "fast", "tomesd"),
    *("mine", "ddim", "a: b", "a=b,c=d", ";;", ","),
]


class Reached(Exception):
    """All checks are passed: what is heavy would begin here."""


def n_cases(usual: int) -> int:
    """How many cases to try."""
    return int(os.environ.get("FUZZ", usual))


def cases(usual: int) -> Iterator[tuple[int, random.Random]]:
    """The number of each case, and its own source of chance."""
    for number in range(SEED, SEED + n_cases(usual)):
        yield number, random.Random(number)


def value(chance: random.Random) -> str:
    """A text that somebody may give for anything, also by mistake."""
    if chance.random() < 0.7:
        return chance.choice(TEXTS)
    return "".join(chance.choice(TEXTS)[:9] for _ in range(chance.randrange(1, 4)))


def json_value(chance: random.Random, depth: int = 0) -> object:
    """Anything that JSON can hold."""
    kind = chance.randrange(9 if depth < 3 else 7)
    if kind < 3:
        return value(chance).replace("\ud800", "")
    if kind < 5:
        return chance.choice([0, 1, -1, 20, 2**70, 0.5, -3.5, 1e308])
    if kind < 7:
        return chance.choice([None, True, False])
    if kind == 7:
        return [json_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    return {value(chance)[:20]: json_value(chance, depth + 1) for _ in range(chance.randrange(3))}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file that was cut off, or of which some bytes are others, or that is something else."""
    kind = chance.randrange(5)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        start = chance.randrange(len(data))
        return data[:start] + chance.randbytes(chance.randrange(1, 30)) + data[start:]
    if kind == 2:
        start = chance.randrange(len(data))
        return data[:start] + data[start + chance.randrange(1, 60) :]
    changed = bytearray(data)
    for _ in range(1 if kind == 3 else chance.randrange(1, 40)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def outcome(action: Callable[[], object], what: object) -> str:
    """What came of a case: it works, or it is refused in one line; all else is a fault."""
    try:
        action()
    except Reached:
        return "works"
    except InputError as error:
        if error.exit_code != 2 or not escaped(error, 1000):
            raise AssertionError(f"{error!r} came of {what!r:.2000}") from error
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} came of {what!r:.2000}") from error
    return "works"


def files_below(folder: Path) -> list[Path]:
    """Everything in a folder, to see that nothing was left there."""
    return sorted(folder.rglob("*"))


def told(what: str, counts: Counter[str]) -> None:
    """Print the counts, for docs/reliability.md."""
    print(f"{what}: {sum(counts.values())} tried, {dict(counts)}")
