"""The console commands that ``pip install`` makes; scripts/ has doors to the same programs."""

from functools import partial

from ldm.cli.program import run_program

txt2img = partial(run_program, "ldm.cli.txt2img")
img2img = partial(run_program, "ldm.cli.img2img")
inpaint = partial(run_program, "ldm.cli.inpaint")
webui = partial(run_program, "ldm.web.program")
convert = partial(run_program, "ldm.checkpoint.program")
train = partial(run_program, "ldm.training.run")
benchmark = partial(run_program, "ldm.evaluation.benchmark.program")
