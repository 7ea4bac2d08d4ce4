"""The door to `ldm.training.run`."""

from ldm.cli.program import run_program

if __name__ == "__main__":
    run_program("ldm.training.run")
