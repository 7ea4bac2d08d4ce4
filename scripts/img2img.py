"""Redraw a picture after a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import flags
from ldm.cli.jobs import read_jobs
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


def build_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(__doc__, EPILOG)
    group = flags.add_prompt_flags(parser)
    group.add_argument("--init-img", required=True, metavar="FILE", help="the picture to redraw")
    flags.add_strength_flag(group)
    flags.add_sampling_flags(parser)
    flags.add_tome_flags(parser)
    flags.add_model_flags(parser)
    flags.add_output_flags(parser, "outputs/img2img-samples")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = build_parser()
    args = parser.parse_args(argv)
    jobs = read_jobs(parser, args)
    model = flags.model_arguments(args)
    gallery = flags.gallery(args)
    init = load_rgb(args.init_img)

    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_checkpoint(**model)
    notes = {"init_img": args.init_img}
    # what cannot be used is said before anything is drawn
    merging = [pipeline.tome_config(job.tome) for job in jobs]
    for job, config in zip(jobs, merging, strict=True):
        pipeline.set_tome(config)
        for picture in pipeline.generate(job.settings, init, progress=True, notes=notes):
            gallery.add(picture)
    gallery.close()
    print(f"Pictures are in {args.outdir}")


if __name__ == "__main__":
    flags.run(main)
