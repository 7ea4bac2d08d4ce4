"""The flags that programs share, in groups. What they mean is in `ldm.cli.options`."""

from __future__ import annotations

import argparse

from ldm.cli.parser import Parser, whole
from ldm.settings import NOISE_ORDERS, SAMPLERS, SCHEDULES, UPSCALERS

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_REPEATS = 100_000


def add_prompt_flags(
    parser: Parser, has_file: bool = True, usual: str = "the model's own example"
) -> argparse._ArgumentGroup:
    """What to draw, and what that usually is; returns the group, for what a program adds to it."""
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    add("--prompt", help=f"the text to draw (default: {usual})")
    add("--negative_prompt", default="", metavar="TEXT", help="what the picture should not show")
    add(
        "--long_prompt",
        action="store_true",
        help="read prompts of any length (default: cut them off after 75 tokens)",
    )
    add(
        "--emphasis",
        action="store_true",
        help=r"read (word:1.2), (word) and [word] as weights; write \( for a bracket",
    )
    add(
        "--clip_skip",
        type=int,
        default=1,
        metavar="N",
        help="use the N-th last layer of the text encoder (default: 1, as it was trained)",
    )
    if has_file:
        add(
            "--from-file",
            metavar="FILE",
            help="draw a picture for each line of a text file; - reads standard input. A line is a "
            "prompt, or in txt2img and img2img a JSON object of flags. Empty lines and lines that "
            "begin with # are skipped",
        )
        add(
            "--repeat",
            type=whole(1, MOST_REPEATS),
            default=1,
            metavar="N",
            help="with --from-file: draw each line N times",
        )
    return group


def add_picture_flag(group: argparse._ArgumentGroup) -> None:
    """Take the settings of a picture that was drawn before."""
    group.add_argument(
        "--from_picture",
        metavar="FILE",
        help="use the settings stored in a picture (ours, or the A1111 web UI's; PNG, JPEG or "
        "WebP); flags win over them",
    )


def add_strength_flag(group: argparse._ArgumentGroup) -> None:
    """How much of a picture to start from is redrawn."""
    group.add_argument(
        "--strength",
        type=float,
        default=0.75,
        metavar="0..1",
        help="how much to redraw: 0 keeps the picture, 1 ignores it (default: 0.75). "
        "strength x steps steps are run",
    )


def add_sampling_flags(parser: Parser) -> None:
    """How to draw it."""
    group = parser.add_argument_group("how to draw it", "Defaults come from the model.")
    add = group.add_argument
    add("--ddim_steps", "--steps", type=int, dest="steps", metavar="N", help="sampling steps")
    one = group.add_mutually_exclusive_group().add_argument
    one("--sampler", choices=SAMPLERS, help="how noise is removed")
    one("--plms", action="store_const", const="plms", dest="sampler", help="= --sampler plms")
    one(
        "--dpm_solver",
        "--dpm",
        action="store_const",
        const="dpm_solver",
        dest="sampler",
        help="= --sampler dpm_solver",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="uniform",
        help="where samplers from euler on take their steps: uniform (default); karras: more steps "
        "at little noise; or sgm_uniform: a longer last step",
    )
    add(
        "--reuse_deep",
        type=int,
        metavar="N",
        help="compute the deep half of the U-Net in every N-th step alone (DeepCache; default: 1)",
    )
    add("--ddim_eta", type=float, default=0.0, dest="eta", metavar="0..1", help="noise of DDIM")
    add(
        "--scale",
        type=float,
        help="how strongly the prompt guides; 1: no guidance, twice as fast",
    )
    add("--H", type=int, help="height in pixels, a multiple of 8")
    add("--W", type=int, help="width in pixels, a multiple of 8")
    add("--seed", type=int, default=42, help="of the first picture (default: %(default)s); -1: any")
    add("--n_samples", type=int, default=1, metavar="N", help="pictures at a time (default: 1)")
    add("--n_iter", type=int, default=1, metavar="N", help="how often to do that (default: 1)")
    add(
        "--rng",
        choices=NOISE_ORDERS,
        default="image",
        help="image (default): picture i has its own noise, from seed + i; upstream: one stream "
        "of noise for all, as CompVis's scripts draw it",
    )
    add(
        "--fixed_code",
        action="store_true",
        help="start all pictures from the same noise (with --rng upstream: all batches)",
    )


def add_hires_flags(parser: Parser) -> None:
    """The second pass of txt2img, on the enlarged picture."""
    group = parser.add_argument_group(
        "second pass", "The picture is enlarged and redrawn, as with img2img."
    )
    add = group.add_argument
    add(
        "--hires_scale",
        type=float,
        default=1.0,
        metavar="1..8",
        help="enlarge by this factor; 1 (default): no second pass",
    )
    add(
        "--hires_strength",
        type=float,
        default=0.6,
        metavar="0..1",
        help="how much to redraw (default: 0.6)",
    )
    add(
        "--hires_steps",
        type=int,
        metavar="N",
        help="strength x N steps are run (default: as --steps)",
    )
    add(
        "--hires_upscaler",
        choices=UPSCALERS,
        default="latent",
        help="latent (default): enlarge the latents; lanczos: the picture, which stays closer to "
        "the first pass",
    )
    add(
        "--tome-hires-ratio",
        metavar="RATIO|auto",
        help="share of tokens removed in the second pass; = --tome-hires ratio=RATIO",
    )


def add_model_flags(parser: Parser) -> None:
    """What draws it."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add(
        "--ckpt",
        metavar="PATH",
        help="checkpoint (.ckpt or .safetensors) of Stable Diffusion 1 or 2; default: "
        "models/ldm/stable-diffusion-v1/model.ckpt if it is there, else the demo model",
    )
    add("--config", metavar="YAML", help="its configuration; rarely needed: it is recognised")
    add("--C", type=int, help="latent channels; only checked, the model decides")
    add("--f", type=int, help="pixels to a latent; only checked, the model decides")
    add("--ema", action="store_true", help="use the averaged weights of a training checkpoint")
    add(
        "--parameterization",
        choices=("eps", "v"),
        help="what the model predicts; needed only where the file does not say",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="add a LoRA to the model, as strongly as WEIGHT says (default: 1); can be repeated",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:WORD]",
        help="a textual inversion; WORD, or else the file's name and the word that it was trained "
        "as, stand for it in a prompt; can be repeated",
    )
    add("--controlnet", metavar="FILE", help="a ControlNet of Stable Diffusion 1 or 2")
    add("--control", metavar="PICTURE", help="what it reads: edges, depth, ... as it was trained")
    add("--control_canny", action="store_true", help="let it read the picture's Canny edges")
    add(
        "--control_strength",
        type=float,
        default=1.0,
        metavar="0..2",
        help="how strongly it guides (default: 1)",
    )
    add(
        "--vae",
        metavar="FILE",
        help="a VAE in place of the model's own (default: MODEL.vae.safetensors, .vae.pt or "
        ".vae.ckpt beside the model, if it is there)",
    )
    add(
        "--device",
        default="auto",
        help="auto (default): cuda, else mps, else cpu; or one of these, or cuda:1",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights; auto (default): float16 on cuda, bfloat16 on processors made "
        "for it, else float32",
    )
    add(
        "--precision",
        choices=("full", "autocast"),
        default="autocast",
        help="full: --dtype float32; autocast (default): what --dtype says",
    )
    add(
        "--attention",
        choices=("sdpa", "einsum"),
        default="sdpa",
        help="sdpa (default): torch's fast kernels; einsum: CompVis's formula, for comparison",
    )
    add(
        "--compile",
        choices=("auto", "no", "blocks", "graph"),
        default="auto",
        help="graph: replay each step as a CUDA graph; blocks: compile the transformer blocks, a "
        "minute or more for each size; auto (default): graph on cuda, no elsewhere",
    )


def add_output_flags(parser: Parser, outdir: str) -> None:
    """Where it goes."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--outdir", default=outdir, metavar="DIR", help="where pictures go (default: %(default)s)")
    add(
        "--n_rows",
        type=whole(0, 10_000),
        default=0,
        metavar="N",
        help="pictures in a row of the grid (default: --n_samples)",
    )
    add("--skip_grid", action="store_true", help="do not save a grid")
    add("--skip_save", action="store_true", help="do not save single pictures")
    add("--no_metadata", action="store_true", help="do not write the settings into the pictures")


def add_insight_flags(parser: Parser) -> None:
    """What a run tells about itself."""
    group = parser.add_argument_group("insight")
    group.add_argument("--verbose", action="store_true", help="say more: versions, times, memory")
    group.add_argument(
        "--profile",
        action="store_true",
        help="record one step with torch's profiler; open OUTDIR/trace-0000.json in "
        "chrome://tracing or ui.perfetto.dev",
    )


def add_skip_flag(group: argparse._ArgumentGroup) -> None:
    """Go on with a run that was stopped."""
    group.add_argument(
        "--skip",
        type=whole(0, 10**9),
        default=0,
        metavar="N",
        help="leave out the first N pictures; goes on with a run that was stopped",
    )
