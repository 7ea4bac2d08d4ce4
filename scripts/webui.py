"""The door to `ldm.web.program`."""

from ldm.cli.program import run_program

if __name__ == "__main__":
    run_program("ldm.web.program")
