"""Draw pictures of a text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ldm.cli import drawing, flags, options
from ldm.cli.jobs import check_skip, prompts_of, read_jobs
from ldm.cli.parser import Parser
from ldm.cli.program import leaving_at_once
from ldm.cli.prompt_loop import prompt_loop
from ldm.cli.tome_flags import add_tome_flags
from ldm.distributed import Process
from ldm.errors import InputError
from ldm.settings import Settings

EPILOG = """
examples:
  four pictures of the demo model, with half of the tokens merged:
    python scripts/txt2img.py --prompt "the sea at sunset" --n_samples 4 --tome-ratio 0.5
  a checkpoint of your own, larger and with another sampler:
    python scripts/txt2img.py --ckpt model.safetensors --H 768 --W 512 --dpm_solver --steps 20
  twice as large in a second pass, where merging helps most:
    python scripts/txt2img.py --hires_scale 2 --tome-hires-ratio 0.5
  a picture for each line of a file:
    python scripts/txt2img.py --from-file prompts.txt --negative_prompt "blurry"
  a line can have settings of its own, in JSON:
    {"prompt": "the sea at dawn", "steps": 40, "tome": {"ratio": 0.4}}
  the same on eight GPUs, under the same numbers:
    torchrun --nproc-per-node 8 scripts/txt2img.py --from-file prompts.txt
  prompt after prompt, with the model loaded once:
    python scripts/txt2img.py --interactive
  a picture again, at other steps:
    python scripts/txt2img.py --from_picture outputs/txt2img-samples/samples/00000.png --steps 50

Pictures land in OUTDIR/samples/00000.png and on, all of a run in OUTDIR/grid-0000.png.
"""


logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser)
    flags.add_picture_flag(group)
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts, one after the other; !help there says what can be set",
    )
    flags.add_skip_flag(group)
    flags.add_sampling_flags(parser)
    flags.add_hires_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/txt2img-samples")
    flags.add_insight_flags(parser)
    return parser


def _say_idle(runs: Iterable[Settings]) -> None:
    """Name what is set of the second pass where there is none."""
    usual = Settings()
    idle = {
        name
        for settings in runs
        for name in ("hires_strength", "hires_steps", "hires_upscaler")
        if settings.hires_scale == 1 and getattr(settings, name) != getattr(usual, name)
    }
    if idle:
        logger.warning("no effect without a second pass (hires_scale): %s", ", ".join(sorted(idle)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = options.parse(build_parser(), argv)
    if args.interactive and (args.prompt is not None or args.from_file is not None):
        raise InputError("--interactive asks for prompts: leave out --prompt and --from-file")
    if args.interactive and (args.skip or args.profile):
        raise InputError("--interactive asks for prompts: leave out --skip and --profile")
    check_skip(args)
    jobs = read_jobs(args)
    _say_idle(job.settings for job in jobs)
    model = options.model_arguments(args)
    gallery = options.gallery(args)
    process = Process.from_environment()
    if process.n_processes > 1 and args.rng == "upstream":
        raise InputError("--rng upstream is one stream of noise: it cannot be shared by processes")
    n_pictures = sum(job.settings.n_pictures for job in jobs)
    if process.n_processes > 1 and n_pictures > options.MOST_PICTURES:
        raise InputError(
            f"--n_samples {args.n_samples}, --n_iter {args.n_iter}: processes share at most "
            f"{options.MOST_PICTURES} pictures of a run, not {n_pictures}"
        )
    if process.n_processes > 1 and args.interactive:
        raise InputError("--interactive is for a single process: start it without torchrun")
    model["device"] = process.device(model["device"])

    with leaving_at_once():
        from ldm.pipeline import Pipeline

    drawing.tell_more(args)
    with process.joined():
        pipeline = Pipeline.from_checkpoint(**model, prompts=prompts_of(jobs))
        if process.n_processes > 1 or args.interactive:
            gallery.has_grid = False
        if not args.interactive:
            canvas = drawing.Canvas(pipeline, gallery, args, process)
            with canvas.pictures(jobs) as pictures:
                for picture in pictures:
                    canvas.save(picture)
            return

        def draw(settings: Settings) -> None:
            for picture in pipeline.generate(settings, progress=True):
                path = gallery.add(picture)
                print("Drawn, and not saved" if path is None else f"Saved {path}")

        prompt_loop(options.wishes(args), pipeline.set_tome, draw)
    print(drawing.where_saved(gallery, args))
