"""The door to `ldm.cli.img2img`."""

from ldm.cli.program import run_program

if __name__ == "__main__":
    run_program("ldm.cli.img2img")
