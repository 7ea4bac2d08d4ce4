"""What the command-line programs have in common; importing this needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ldm.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Run a program: say what it logs, and end with one clear line where the input is bad.

    The exit code is 2 for bad input and 130 where the user interrupts.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
