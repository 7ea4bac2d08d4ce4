"""Errors that are meant for the user's eyes, and how values look in them: one line each."""

from __future__ import annotations

import errno
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

# What torch, oneDNN, CUDA, numpy, safetensors and the C library say where memory runs out.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to) (allocate|mmap)"
    r"|could not (create|execute) a primitive|bad_alloc|_ALLOC_FAILED|can't start new thread"
    r"|failed to map segment",
    re.IGNORECASE,
)
_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = 6
_short.maxlong = _short.maxstring = _short.maxother = 200
SUPPORTED = "supported are Stable Diffusion 1.x and 2.x, and their inpainting models"
LESS_TO_DRAW = "try n_samples 1, a smaller H and W, or merging tokens (--tome-ratio 0.5)"


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the value and the way out; command-line programs print it
    and exit with its code, without a traceback.
    """

    exit_code = 2


class OutOfMemory(InputError):
    """What was asked for does not fit into the memory of this machine; the message says what does.

    Args:
        way_out: what to lower.
    """

    exit_code = 3

    def __init__(self, way_out: str = LESS_TO_DRAW) -> None:
        super().__init__(f"there is not enough memory: {way_out}")


class NotFinite(InputError):
    """A stage of the model gives NaN or infinities in float32 too.

    Args:
        stage: what it is called.
    """

    def __init__(self, stage: str) -> None:
        super().__init__(f"{stage} gives values that are not numbers, in float32 too")
        self.stage = stage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out, in main memory or on a device."""
    if isinstance(error, InputError):
        return isinstance(error, OutOfMemory)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, Exception) and _NO_MEMORY.search(str(error)) is not None


@contextmanager
def memory_advice(way_out: str = LESS_TO_DRAW) -> Iterator[None]:
    """Turn every complaint of too little memory inside into one that says what to lower.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(way_out) from None


def escaped(text: object, limit: int = 120) -> str:
    """A name, path or text from outside, safe to print: one line, no control characters, short.

    Args:
        text: anything; its ``str``.
        limit: characters that the result may have; a longer text ends with ``...``.
    """
    whole = str(text)
    cut = whole[: limit + 1]
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
    is_long = len(whole) > limit or len(safe) > limit
    return safe[: max(limit - 3, 0)] + "..." if is_long else safe


def shown(value: object, limit: int = 80) -> str:
    """Any value as a message shows it: as ``repr``, but always one short, printable line.

    Args:
        value: anything, of any size; texts appear in quotes.
        limit: as for `escaped`.
    """
    if isinstance(value, str):
        return f"'{escaped(value, limit)}'"
    try:
        text = _short.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<a huge {type(value).__name__}...>"
    return escaped(text, limit)
