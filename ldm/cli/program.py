"""How programs run and end: messages, stop signals, exit codes, streams that cannot be written.

Exit codes: 0 done, 1 a training whose loss is no number, 2 bad input, 3 not enough memory, 130
interrupted (Ctrl+C), 143 ended (SIGTERM), 129 ended because its terminal was closed (SIGHUP).
This module imports next to nothing, so that a program can be stopped while it imports the rest.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from ldm.errors import InputError, OutOfMemory, escaped, is_out_of_memory

LONGEST = 1000  # characters of a message
# What tells a process to end, besides Ctrl+C; only Unix has the second, of a terminal that closes.
ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """The process was told to end; cleaned up after like Ctrl+C.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


# Programs that see few sizes of pictures, and need more kernels for each: a step of the demo's
# training takes 278, which would be made anew in each step if there were room for 128.
FEW_SIZES = ("ldm.training.run",)


def run_program(module: str) -> None:
    """Import a module and run its `main`: what all scripts and console commands do.

    Args:
        module: such as ``ldm.cli.txt2img``.
    """
    if module not in FEW_SIZES:
        bound_caches()
    with running():
        with leaving_at_once():
            program = importlib.import_module(module)
        program.main()


def bound_caches() -> None:
    """Let torch's kernels of convolutions and products keep those of 128 shapes, not of 1024.

    They keep some MiB for each new size of picture. What the user has set stays; afterwards torch
    has read these variables.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def run(main: Callable[[], None]) -> None:
    """Run a program as `running` says."""
    with running():
        main()


@contextmanager
def running() -> Iterator[None]:
    """Show what a program logs, and end it with one clear line and its exit code.

    The argument of a KeyboardInterrupt, if it has one, says what is finished.
    """
    ours = [number for number in ENDS if _listen(number, _terminate)]
    with _lasting_streams():
        logger = logging.getLogger("ldm")
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, Messages) for handler in logger.handlers):
            logger.addHandler(Messages())
        try:
            yield
        except InputError as error:
            _end(f"error: {error}", error.exit_code)
        except KeyboardInterrupt as stop:
            word, code = word_and_code(getattr(stop, "number", signal.SIGINT))
            _end(": ".join([word, *map(str, stop.args)]), code)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out = OutOfMemory()
            _end(f"error: {out}", out.exit_code)
        finally:
            for number in ours:
                signal.signal(number, signal.SIG_DFL)


def _end(message: str, code: int) -> NoReturn:
    print(escaped(message, LONGEST), file=sys.stderr, flush=True)
    sys.exit(code)


class Messages(logging.Handler):
    """Shows what the package logs: news on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text = escaped(record.getMessage(), LONGEST)
        if record.levelno >= logging.WARNING:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)


# --- stopping -----------------------------------------------------------------------------------


def word_and_code(number: int) -> tuple[str, int]:
    """How an end by a signal is told, and its exit code."""
    return "interrupted" if number == signal.SIGINT else "ended", 128 + number


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    word, code = word_and_code(number)
    with suppress(OSError):
        os.write(2, f"{word}: nothing was begun\n".encode())
    os._exit(code)


def _listen(number: int, handler: Callable[[int, FrameType | None], NoReturn]) -> bool:
    """Handle a signal; False where that is not for this thread, or somebody else does it."""
    try:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
            return False
        signal.signal(number, handler)
    except ValueError:
        return False
    return True


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Let a signal end the process on the spot: for imports, which an exception can tear apart.

    Nothing has been begun then, so that there is nothing to tidy up.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDS)}
    try:
        for number in before:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, _leave)
    except ValueError:  # not the main thread, to which signals come
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def said_when_stopped(what: Callable[[], str]) -> Iterator[None]:
    """Add to an interruption of the block what is finished, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (what(),)
        raise


# --- streams --------------------------------------------------------------------------------------


class Lasting:
    """A stream that takes everything: once it cannot be written, what comes is dropped.

    A reader that has gone (``| head -1``) is no news. Any other reason is told once on standard
    error, and the work goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, unless what is there cannot be written."""
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except OSError as error:
            self._is_lost = True
            with suppress(OSError, ValueError, AttributeError):
                # so that nothing is left for the interpreter to write when it ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if not isinstance(error, BrokenPipeError) and self._stream is not sys.__stderr__:
                print(
                    f"warning: standard output cannot be written ({error.strerror}); "
                    "messages are lost, the work goes on",
                    file=sys.stderr,
                )

    def __getattr__(self, name: str) -> Any:
        """Be the stream in everything else."""
        return getattr(self._stream, name)


@contextmanager
def _lasting_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, Lasting) else Lasting(stream)
        for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
