"""The door to `ldm.evaluation.visualize`."""

from ldm.cli.program import run_program

if __name__ == "__main__":
    run_program("ldm.evaluation.visualize")
