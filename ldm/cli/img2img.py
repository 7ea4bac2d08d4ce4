"""Redraw a picture after a text."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli import drawing, flags, options
from ldm.cli.jobs import check_skip, prompts_of, read_jobs
from ldm.cli.parser import Parser
from ldm.cli.program import leaving_at_once
from ldm.cli.tome_flags import add_tome_flags
from ldm.errors import escaped
from ldm.images import load_rgb

EPILOG = """
examples:
  turn a photograph into a painting of it:
    python scripts/img2img.py --init-img photo.jpg --prompt "an oil painting" --strength 0.6
  with half of the tokens merged, 512 pixels wide:
    python scripts/img2img.py --init-img photo.jpg --prompt "snow" --W 512 --tome-ratio 0.5

The picture keeps its shape. Its sides become multiples of 8, and at most 1.5 times the model's own
size; --H and --W decide otherwise.
"""


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser)
    group.add_argument("--init-img", required=True, metavar="FILE", help="the picture to redraw")
    flags.add_picture_flag(group)
    flags.add_skip_flag(group)
    flags.add_strength_flag(group)
    flags.add_sampling_flags(parser)
    add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/img2img-samples")
    flags.add_insight_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = options.parse(build_parser(), argv)
    check_skip(args)
    jobs = read_jobs(args)
    model = options.model_arguments(args)
    gallery = options.gallery(args)
    init = load_rgb(args.init_img)

    with leaving_at_once():
        from ldm.pipeline import Pipeline

    drawing.tell_more(args)
    canvas = drawing.Canvas(
        Pipeline.from_checkpoint(**model, prompts=prompts_of(jobs)), gallery, args
    )
    notes = {"init_img": escaped(args.init_img, 1000)}
    with canvas.pictures(jobs, init, notes=notes) as pictures:
        for picture in pictures:
            canvas.save(picture)
