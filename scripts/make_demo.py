"""The door to `ldm.demo.make`."""

from ldm.cli.program import run_program

if __name__ == "__main__":
    run_program("ldm.demo.make")
